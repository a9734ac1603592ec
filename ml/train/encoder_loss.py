"""What an encoder learns from: masked tokens and the next sentence (Devlin et al. 2019, section 3.1), or classes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ml.models import Bert, SelfAttention, head_params
from ml.train.config import TrainConfig
from ml.train.loss import chunked_loss
from ml.train.objective_class import Batch, Metrics


def make_pretraining_loss(model: Bert, config: TrainConfig) -> Callable[..., tuple[jax.Array, Metrics]]:
    """Returns ``(params, microbatch, extras=None) -> (objective, metrics)``, for `ml.data.masking`'s batches.

    The objective is the cross-entropy of the masked tokens, weighted by ``loss_mask``, plus that of the next sentence,
    weighted by ``row_mask``; the masks say what the two are averaged over (`Objective.weighed`).
    """

    def logits_of(head: Any, hidden: jax.Array) -> Any:
        return model.apply({"params": head}, hidden, method="logits")

    def loss(params, batch, extras=None):
        del extras  # an encoder has none
        hidden = encoded(model, config, params, batch)
        objective, (nll, correct) = chunked_loss(
            logits_of,
            head_params(model.config, params),
            at_positions(model, hidden, batch["masked_positions"]),
            batch["targets"],
            batch["loss_mask"],
            config.z_loss,
            config.loss_chunk,
            True,
        )
        sentences: Any = model.apply({"params": params}, hidden, method="next_sentence_logits")
        sentence_nll, sentence_correct = classified(sentences, batch["next_sentence"], batch["row_mask"])
        metrics = {"loss": nll, "accuracy": correct}
        metrics |= {"next_sentence_loss": sentence_nll, "next_sentence_accuracy": sentence_correct}
        return objective + sentence_nll, metrics

    return loss


def make_classification_loss(model: Bert, config: TrainConfig) -> Callable[..., tuple[jax.Array, Metrics]]:
    """Returns the same for `ml.data.labelled`'s batches: the cross-entropy of the labels, weighted by ``loss_mask``."""

    def loss(params, batch, extras=None):
        del extras
        hidden = encoded(model, config, params, batch)
        logits: Any = model.apply({"params": params}, hidden, batch["segment_ids"], method="class_logits")
        nll, correct = classified(logits, batch["targets"], batch["loss_mask"])
        return nll, {"loss": nll, "accuracy": correct}

    return loss


def encoded(model: Bert, config: TrainConfig, params: Any, batch: Batch) -> Float[Array, "batch length embed"]:
    """The encoder's output for a batch with ``tokens``, ``token_types`` and ``segment_ids`` (0: padding).

    In training a batch also has ``dropout_key``.
    """
    strategy = SelfAttention(batch["segment_ids"], config.attention, causal=False)
    rngs = {"dropout": batch["dropout_key"]} if "dropout_key" in batch else {}
    outputs: Any = model.apply({"params": params}, batch["tokens"], strategy, batch["token_types"], rngs=rngs)
    return outputs[0]


def at_positions(
    model: Bert, hidden: Float[Array, "batch length embed"], positions: Int[Array, "batch predictions"]
) -> Float[Array, "batch predictions embed"]:
    """Hidden states at some positions of each row, so that only those have logits.

    As a product with ones and zeros: exact, sharded like any other, and its gradient is no scatter.
    """
    chosen = positions[..., None] == jnp.arange(hidden.shape[1])
    return jnp.einsum(
        "bpl,ble->bpe",
        chosen.astype(hidden.dtype),
        hidden,
        precision=jax.lax.Precision.HIGHEST,
        out_sharding=model.place("batch", "length", None),
    )


def classified(
    logits: Float[Array, "batch classes"], labels: Int[Array, "batch 1"], mask: Float[Array, "batch 1"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross-entropy in nats, and how many labels have the largest logit, both summed over rows weighted by ``mask``."""
    at_label = jnp.where(jnp.arange(logits.shape[-1]) == labels, logits, 0).sum(axis=-1, keepdims=True)
    log_z = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    correct = at_label >= logits.max(axis=-1, keepdims=True)
    return jnp.sum((log_z - at_label) * mask), jnp.sum(correct * mask)
