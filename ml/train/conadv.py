"""Adversarial training on images: with adversaries of this step's weights, or concurrently, of the last step's.

Source: Liu et al. 2021, "Concurrent Adversarial Learning for Large-Batch Training" (ConAdv). A step's gradient is the
mean of those of the clean and of the attacked images, each normalized by its own batch statistics; evaluation goes by
the clean ones' (AdvProp, Xie et al. 2020). The attack is one step along the sign of the gradient by the pixels.

``sequential`` (the paper's DisAdv) attacks a batch with the weights that then train on it, so the two gradients come
one after the other. ``concurrent`` (ConAdv, staleness 1) attacks the *next* batch with the present weights, while they
train on this one: neither gradient waits for the other. What it found is part of the state (`TrainState.carried`), so
that a run that is resumed goes on exactly; the first batch of a run is not attacked. ``noise`` is the control: random
signs instead of the gradient's.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num, PyTree

from ml.models import ResNet
from ml.parallel import Rules
from ml.train.config import TrainConfig
from ml.train.image_loss import class_loss, image_classes, initial_statistics, running, trained_logits
from ml.train.objective_class import Batch, Metrics, Objective
from ml.train.state import RUNNING

# Running statistics of attacked images; and what `TrainState.carried` holds.
ATTACKED, PERTURBATION = "adversarial_batch_stats", "perturbation"

Attack = Callable[[PyTree, Batch], Float[Array, "rows height width channels"]]


def image_objective(model: ResNet, config: TrainConfig, rules: Rules | None) -> Objective:
    """A classifier's objective, clean or adversarial as ``config.adversarial`` says."""
    clean = image_classes(model, config, rules)
    if config.adversarial == "none":
        return clean
    perturbation: dict[str, Attack] = {
        "noise": lambda params, batch: _random_signs(batch, config.adversarial_step),
        "sequential": lambda params, batch: attack(
            model, params, batch["images"], batch["targets"], config.adversarial_step
        ),
        "concurrent": lambda params, batch: batch[PERTURBATION],
    }
    more: dict[str, Any] = {}
    if config.adversarial == "concurrent":
        more = {"carried": _unattacked, "carry": _attack_on_next(model, config.adversarial_step)}
    return _adversarial(model, config, clean, perturbation[config.adversarial], more)


def attack(
    model: ResNet,
    params: PyTree,
    images: Num[Array, "rows height width channels"],
    targets: Int[Array, "rows 1"],
    step: float,
) -> Float[Array, "rows height width channels"]:
    """What to add to pixels in [0, 1] so that the loss grows: ``step`` along the gradient's sign, within [0, 1].

    Where the gradient is not finite, nothing. The network normalizes by the statistics of these images.
    """
    pixels = as_pixels(images)

    def loss(pixels: jax.Array) -> jax.Array:
        logits, _ = trained_logits(model, params, pixels)
        counted = {"targets": targets, "loss_mask": jnp.ones_like(targets, jnp.float32)}
        return class_loss(logits, counted)[0]

    gradient = jax.grad(loss)(pixels)
    signs = jnp.where(jnp.isfinite(gradient), jnp.sign(gradient), 0)
    return _within(pixels, step * signs)


def as_pixels(images: Num[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Images as floats in [0, 1]."""
    return images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images


def _within(pixels: jax.Array, perturbation: jax.Array) -> jax.Array:
    return jnp.clip(pixels + perturbation, 0, 1) - pixels


def _random_signs(batch: Batch, step: float) -> jax.Array:
    pixels = as_pixels(batch["images"])
    signs = jax.random.rademacher(batch["dropout_key"], pixels.shape, jnp.float32)
    spec = jax.typeof(pixels).sharding.spec
    signs = jax.reshard(signs, spec) if any(spec) else signs
    return _within(pixels, step * signs)


def _unattacked(batch: Batch) -> dict[str, jax.Array]:
    """No perturbation of a first batch, given as arrays or as shapes."""
    images = batch["images"]
    sharding = getattr(images, "sharding", None)
    spec = getattr(sharding, "spec", None)  # a batch off any mesh has none
    return {PERTURBATION: jnp.zeros(images.shape, jnp.float32, out_sharding=spec)}


def _attack_on_next(model: ResNet, step: float) -> Callable[[PyTree, Batch], dict[str, jax.Array]]:
    """``(params, batch) -> perturbation`` of the batch that comes next, one microbatch after another."""

    def carry(params: PyTree, batch: Batch) -> dict[str, jax.Array]:
        def of_microbatch(_, part):
            images, targets = part
            return None, attack(model, params, images, targets, step)

        _, found = jax.lax.scan(of_microbatch, None, (batch["next_images"], batch["next_targets"]))
        return {PERTURBATION: found}

    return carry


def _adversarial(
    model: ResNet, config: TrainConfig, clean: Objective, perturbation: Attack, more: dict[str, Any]
) -> Objective:
    """The mean of the losses of clean and of attacked images; the clean one is reported, and the other beside it."""

    def loss(params: PyTree, batch: Batch, extras: Any = None) -> tuple[jax.Array, Metrics]:
        objective, metrics = clean.loss(params, batch, extras)
        fixed = jax.lax.stop_gradient(params)
        attacked = as_pixels(batch["images"]) + jax.lax.stop_gradient(perturbation(fixed, batch))
        logits, statistics = trained_logits(model, params, attacked)
        also, of_attacked = class_loss(logits, batch, config.label_smoothing)
        weight = batch["loss_mask"].sum()
        metrics |= {f"adversarial_{name}": value for name, value in of_attacked.items()}
        metrics[ATTACKED] = jax.tree.map(lambda x: x * weight, statistics)
        return (objective + also) / 2, metrics

    return Objective(
        loss,
        {**clean.masks, "adversarial_loss": "loss_mask", "adversarial_accuracy": "loss_mask"},
        clean.counts,
        dropout=config.adversarial == "noise",
        extras=lambda: {**clean.extras(), ATTACKED: clean.extras()[RUNNING]},
        settle=lambda params, state, extras, count: (params, running(model, config, state, extras, count)),
        model_state=lambda: initial_statistics(model, config, ATTACKED),
        heldout=clean.heldout,
        **more,
    )
