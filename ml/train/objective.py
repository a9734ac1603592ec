"""What is minimized: a microbatch's loss as a function of the parameters."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ml.models import AttentionStrategy, Bert, Model, ResNet, SelfAttention, Transformer, TwoTower, head_params
from ml.models.moe import MoEStats, update_router_bias
from ml.parallel import Rules
from ml.parallel.context import RingAttention, UlyssesAttention
from ml.train.conadv import image_objective
from ml.train.config import TrainConfig
from ml.train.encoder_loss import make_classification_loss, make_pretraining_loss
from ml.train.image_text_objective import pairs_of_a_batch
from ml.train.loss import chunked_loss
from ml.train.objective_class import Batch, Metrics, Objective


def make_objective(model: Model, config: TrainConfig, rules: Rules | None = None) -> Objective:
    """The objective that suits the model, by the table `OBJECTIVES`."""
    return OBJECTIVES[type(model)](model, config, rules)


def next_tokens(model: Transformer, config: TrainConfig, rules: Rules | None) -> Objective:
    """A decoder's objective."""
    moe, layers = model.config.moe, model.config.num_layers

    def settle(params, model_state, extras, count):
        del count
        if moe and moe.bias_update_rate:
            params = update_router_bias(params, extras["expert_counts"], moe.bias_update_rate)
        return params, model_state

    return Objective(
        make_loss(model, config, rules),
        dict.fromkeys(("loss", "balance"), "loss_mask"),
        lambda batch: {"tokens": batch["loss_mask"].sum()},
        extras=lambda: {"expert_counts": jnp.zeros((layers, moe.num_experts if moe else 0), jnp.int32)},
        settle=settle,
    )


def masked_tokens_or_classes(model: Bert, config: TrainConfig, rules: Rules | None) -> Objective:
    """An encoder's: masked tokens and next sentence, or classes."""
    del rules
    masks = {"loss": "loss_mask", "accuracy": "loss_mask"}
    loss = make_classification_loss(model, config)
    if model.config.encoder is not None and not model.config.encoder.num_classes:
        masks |= {"next_sentence_loss": "row_mask", "next_sentence_accuracy": "row_mask"}
        loss = make_pretraining_loss(model, config)

    def counts(batch):
        return {"tokens": (batch["segment_ids"] > 0).sum()}

    return Objective(loss, masks, counts, dropout=config.dropout > 0)


def make_loss(
    model: Transformer, config: TrainConfig, rules: Rules | None = None
) -> Callable[..., tuple[jax.Array, Metrics]]:
    """Returns ``(params, microbatch, extras=None) -> (objective, metrics)``, summed over counted tokens.

    ``extras["expert_counts"] [layers, experts]`` are those of the same step's earlier microbatches; ``metrics`` holds
    this one's.
    """

    def loss(params, batch, extras=None):
        outputs: Any = model.apply(
            {"params": params},
            batch["tokens"],
            self_attention(batch["segment_ids"], config, rules),
            batch["positions"],
            valid=valid_tokens(batch),
            expert_counts=extras and extras["expert_counts"],
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


OBJECTIVES: Mapping[type, Callable[[Any, TrainConfig, Rules | None], Objective]] = {
    Transformer: next_tokens,
    Bert: masked_tokens_or_classes,
    ResNet: image_objective,
    TwoTower: pairs_of_a_batch,
}
