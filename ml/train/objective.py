"""What is minimized: a microbatch's loss as a function of the parameters."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ml.models import AttentionStrategy, Model, SelfAttention, Transformer, head_params
from ml.models.moe import MoEStats
from ml.parallel import Rules
from ml.parallel.context import RingAttention, UlyssesAttention
from ml.train.config import TrainConfig
from ml.train.encoder_loss import make_classification_loss, make_pretraining_loss
from ml.train.loss import chunked_loss

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss and what it is averaged over.

    Attributes:
      loss: ``(params, microbatch, expert_counts=None) -> (objective, metrics)``, summed over what the masks count;
        ``metrics`` holds ``expert_counts`` besides.
      masks: metric -> the array of a batch whose sum it is averaged over. ``loss_mask`` is that of the loss.
      tokens: batch -> how many tokens it trains on.
      dropout: whether the loss wants a ``dropout_key`` with each microbatch in training.
    """

    loss: Callable[..., tuple[jax.Array, Metrics]]
    masks: Mapping[str, str]
    tokens: Callable[[Batch], jax.Array]
    dropout: bool = False

    def weighed(self, batch: Batch, step: Int[Array, ""]) -> tuple[Batch, jax.Array]:
        """Readies a whole step's batch, so that dividing sums by the sum of ``loss_mask`` averages everything.

        Args:
          batch: ``[microbatches, rows, ...]``.
          step: number of the step, from which the keys of its dropout follow.

        Returns:
          The batch with all other masks scaled accordingly, and the sum of ``loss_mask``.
        """
        count = batch["loss_mask"].sum()
        others = sorted({name for name in self.masks.values() if name != "loss_mask"})
        scaled = {name: batch[name] * (count / jnp.maximum(batch[name].sum(), 1)) for name in others}
        keys = {"dropout_key": dropout_keys(step, len(batch["tokens"]))} if self.dropout else {}
        return {**batch, **scaled, **keys}, count


def make_objective(model: Model, config: TrainConfig, rules: Rules | None = None) -> Objective:
    """The objective that suits the model: next tokens; of an encoder masked tokens and next sentence, or classes."""
    if isinstance(model, Transformer):
        names = ("loss", "balance")
        counted = dict.fromkeys(names, "loss_mask")
        return Objective(make_loss(model, config, rules), counted, lambda batch: batch["loss_mask"].sum())
    masks = {"loss": "loss_mask", "accuracy": "loss_mask"}
    loss = make_classification_loss(model, config)
    if model.config.encoder is not None and not model.config.encoder.num_classes:
        masks |= {"next_sentence_loss": "row_mask", "next_sentence_accuracy": "row_mask"}
        loss = make_pretraining_loss(model, config)
    return Objective(loss, masks, lambda batch: (batch["segment_ids"] > 0).sum(), dropout=config.dropout > 0)


def dropout_keys(step: Int[Array, ""], microbatches: int) -> jax.Array:
    """A key for each microbatch of a step, the same whenever the step is done again (after a restart)."""
    return jax.random.split(jax.random.fold_in(jax.random.key(0), step), microbatches)


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
