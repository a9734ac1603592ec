"""What is minimized: a microbatch's loss as a function of the parameters."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import Array, Int

from ml.models import AttentionStrategy, SelfAttention, Transformer, head_params
from ml.parallel import Rules
from ml.parallel.context import RingAttention, UlyssesAttention
from ml.train.config import TrainConfig
from ml.train.loss import chunked_loss

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


def make_loss(
    model: Transformer, config: TrainConfig, rules: Rules | None = None
) -> Callable[..., tuple[jax.Array, Metrics]]:
    """Returns ``(params, microbatch, expert_counts=None) -> (objective, metrics)``, summed over counted tokens.

    ``expert_counts [layers, experts]`` are those of the same step's earlier microbatches; ``metrics`` holds this one's.
    """
    moe = model.config.moe

    def logits_of(head, hidden):
        return model.apply({"params": head}, hidden, method="logits")

    def loss(params, batch, expert_counts=None):
        segments = batch["segment_ids"]
        strategy = self_attention(segments, config, rules)
        outputs: Any = model.apply(
            {"params": params},
            batch["tokens"],
            strategy,
            batch["positions"],
            valid=None if segments is None else segments > 0,
            expert_counts=expert_counts,
        )
        hidden, _, stats = outputs
        head, mask = head_params(model.config, params), batch["loss_mask"]
        objective, nll = chunked_loss(logits_of, head, hidden, batch["targets"], mask, config.z_loss, config.loss_chunk)
        balance = stats.balance * mask.sum()
        if moe is not None:
            objective = objective + moe.aux_loss_weight * balance
        return objective, {"loss": nll, "balance": balance, "expert_counts": stats.counts}

    return loss


def self_attention(
    segment_ids: Int[Array, "batch length"] | None, config: TrainConfig, rules: Rules | None
) -> AttentionStrategy:
    """How tokens attend to one another in training: on their own device, or over those that share their sequence."""
    if rules is None or rules.mesh.shape["sequence"] == 1:
        return SelfAttention(segment_ids, config.attention)
    if config.context == "ring":
        return RingAttention(segment_ids, rules.spec, rules.sequence_order)
    return UlyssesAttention(segment_ids, rules.spec, rules.sequence_order, config.attention)
