"""What a two-tower model learns from: which image belongs to which text, of all in the batch."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ml.models.two_tower import TwoTower
from ml.parallel import Rules
from ml.train.config import TrainConfig
from ml.train.contrastive import Embedded
from ml.train.contrastive_loss import contrastive_loss
from ml.train.objective_class import Objective

LARGEST_SCALE = 100.0
"""Similarities are multiplied by no more than this (Radford et al. 2021, section 2.5)."""


def pairs_of_a_batch(model: TwoTower, config: TrainConfig, rules: Rules | None) -> Objective:
    """The contrastive objective of `ml.train.contrastive_loss`, over the whole batch of a step.

    In evaluation, which knows no steps, each batch is a world of its own: compare figures at one size.
    """
    del rules

    def embed(params, batch):
        return model.apply({"params": params}, batch["images"], batch["tokens"], batch["segment_ids"])

    def loss(head, embeddings, batch):
        log_scale = capped(model.apply({"params": head}, method="log_scale"))
        images, texts = embeddings
        mask = batch["loss_mask"][:, 0]
        total, (image_hits, text_hits) = contrastive_loss(images, texts, log_scale, mask, config.loss_chunk)
        metrics = {"loss": total, "image_accuracy": image_hits, "text_accuracy": text_hits}
        return total, metrics | {"log_scale": log_scale * mask.sum()}

    def at_once(params, batch, extras=None):
        del extras
        return loss(params, embed(params, batch), batch)

    return Objective(
        at_once,
        dict.fromkeys(("loss", "image_accuracy", "text_accuracy", "log_scale"), "loss_mask"),
        lambda batch: {"tokens": batch["loss_mask"].sum(), "broken": batch["broken"].sum()},
        embedded=Embedded(embed, loss, lambda params: {"logit": params["logit"]}),
    )


@jax.custom_vjp
def capped(log_scale: Float[Array, ""]) -> Float[Array, ""]:
    """At most the logarithm of `LARGEST_SCALE`; beyond it, only what lowers the parameter passes as its gradient."""
    return jnp.minimum(log_scale, jnp.log(LARGEST_SCALE))


def _capped_backward(log_scale: Any, gradient: jax.Array) -> tuple[jax.Array]:
    return (jnp.where((log_scale < jnp.log(LARGEST_SCALE)) | (gradient > 0), gradient, 0),)


capped.defvjp(lambda log_scale: (capped(log_scale), log_scale), _capped_backward)
