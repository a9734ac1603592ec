"""What is minimized: a microbatch's loss as a function of the parameters."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from ml.models import SelfAttention, Transformer, head_params
from ml.train.config import TrainConfig
from ml.train.loss import chunked_loss

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


def make_loss(model: Transformer, config: TrainConfig) -> Callable[[Any, Batch], tuple[jax.Array, Metrics]]:
    """Returns ``(params, microbatch) -> (objective, metrics)``, both summed over the microbatch's counted tokens."""
    moe = model.config.moe

    def logits_of(head, hidden):
        return model.apply({"params": head}, hidden, method="logits")

    def loss(params, batch):
        strategy = SelfAttention(batch["segment_ids"], config.attention)
        outputs: Any = model.apply({"params": params}, batch["tokens"], strategy, batch["positions"])
        hidden, _, balance = outputs
        head, mask = head_params(model.config, params), batch["loss_mask"]
        objective, nll = chunked_loss(logits_of, head, hidden, batch["targets"], mask, config.z_loss, config.loss_chunk)
        balance = balance * mask.sum()
        if moe is not None:
            objective = objective + moe.aux_loss_weight * balance
        return objective, {"loss": nll, "balance": balance}

    return loss
