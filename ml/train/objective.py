"""What is minimized: a microbatch's loss as a function of the parameters."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int

from ml.models import AttentionStrategy, SelfAttention, Transformer, head_params
from ml.models.moe import MoEStats
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

    def loss(params, batch, expert_counts=None):
        outputs: Any = model.apply(
            {"params": params},
            batch["tokens"],
            self_attention(batch["segment_ids"], config, rules),
            batch["positions"],
            valid=valid_tokens(batch),
            expert_counts=expert_counts,
        )
        hidden, _, stats = outputs
        objective, nll = head_loss(model, config, params, hidden, batch)
        weighted, balance = balance_loss(model, stats, batch)
        return objective + weighted, {"loss": nll, "balance": balance, "expert_counts": stats.counts}

    return loss


def valid_tokens(batch: Batch) -> Bool[Array, "batch length"] | None:
    """Which tokens are more than padding; ``None``: all."""
    segments = batch["segment_ids"]
    return None if segments is None else segments > 0


def head_loss(
    model: Transformer, config: TrainConfig, params: Any, hidden: Float[Array, "batch length embed"], batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """What the model's output costs: objective and cross-entropy, summed over counted tokens."""

    def logits_of(head: Any, hidden: jax.Array) -> Any:
        return model.apply({"params": head}, hidden, method="logits")

    head = head_params(model.config, params)
    targets, mask = batch["targets"], batch["loss_mask"]
    return chunked_loss(logits_of, head, hidden, targets, mask, config.z_loss, config.loss_chunk)


def balance_loss(model: Transformer, stats: MoEStats, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """What an uneven use of experts costs, weighted and not, summed over counted tokens; 0 for a dense model."""
    balance, moe = stats.balance * batch["loss_mask"].sum(), model.config.moe
    return balance * (moe.aux_loss_weight if moe is not None else 0.0), balance


def self_attention(
    segment_ids: Int[Array, "batch length"] | None, config: TrainConfig, rules: Rules | None
) -> AttentionStrategy:
    """How tokens attend to one another in training: on their own device, or over those that share their sequence."""
    if rules is None or rules.mesh.shape["sequence"] == 1:
        return SelfAttention(segment_ids, config.attention)
    if config.context == "ring":
        return RingAttention(segment_ids, rules.spec, rules.sequence_order)
    return UlyssesAttention(segment_ids, rules.spec, rules.sequence_order, config.attention)
