"""What an image classifier learns from: smoothed labels; and its running batch statistics."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Num, PyTree

from ml.models import ResNet, init_model_state
from ml.parallel import Rules
from ml.train.config import TrainConfig
from ml.train.encoder_loss import classified
from ml.train.objective_class import Batch, Metrics, Objective
from ml.train.state import AVERAGED, RUNNING


def image_classes(model: ResNet, config: TrainConfig, rules: Rules | None) -> Objective:
    """The cross-entropy of an image's class, ``config.label_smoothing`` of which is spread over all classes.

    Reported is the loss without smoothing. Running statistics take in each step's batch statistics once, averaged over
    its microbatches, so that their pace does not depend on how many there are.
    """
    del rules

    def loss(params: PyTree, batch: Batch, extras: Any = None) -> tuple[jax.Array, Metrics]:
        del extras
        logits, statistics = trained_logits(model, params, batch["images"])
        objective, metrics = class_loss(logits, batch, config.label_smoothing)
        weight = batch["loss_mask"].sum()
        return objective, metrics | {RUNNING: jax.tree.map(lambda x: x * weight, statistics)}

    def settle(params, model_state, extras, count):
        return params, running(model, config, model_state, {RUNNING: extras[RUNNING]}, count)

    def heldout(params, model_state, batch):
        logits = evaluated_logits(model, params, model_state, batch["images"])
        return class_loss(logits, batch)

    return Objective(
        loss,
        {"loss": "loss_mask", "accuracy": "loss_mask"},
        lambda batch: {"tokens": batch["loss_mask"].sum(), "broken": batch["broken"].sum()},
        extras=lambda: {RUNNING: jax.tree.map(jnp.zeros_like, init_model_state(model)[RUNNING])},
        settle=settle,
        model_state=lambda: initial_statistics(model, config),
        heldout=heldout,
    )


def class_loss(
    logits: Float[Array, "rows classes"], batch: Batch, smoothing: float = 0.0
) -> tuple[Float[Array, ""], Metrics]:
    """The objective, and the plain cross-entropy and accuracy beside it, summed over counted rows."""
    nll, correct = classified(logits, batch["targets"], batch["loss_mask"])
    objective = nll
    if smoothing:
        uniform = jax.nn.logsumexp(logits, axis=-1, keepdims=True) - logits.mean(axis=-1, keepdims=True)
        objective = (1 - smoothing) * nll + smoothing * jnp.sum(uniform * batch["loss_mask"])
    return objective, {"loss": nll, "accuracy": correct}


def trained_logits(
    model: ResNet, params: PyTree, images: Num[Array, "rows height width channels"]
) -> tuple[Float[Array, "rows classes"], PyTree]:
    """Logits by the batch's own statistics, and these statistics."""

    def forward(params, images):
        logits, variables = model.apply({"params": params}, images, True, mutable=[RUNNING])
        return logits, variables[RUNNING]

    return _placed_by_the_compiler(forward, model.place("batch", None), model.place())(params, images)


def evaluated_logits(
    model: ResNet, params: PyTree, model_state: dict[str, PyTree], images: Num[Array, "rows height width channels"]
) -> Float[Array, "rows classes"]:
    """Logits by running statistics, or by their average where there is one."""
    statistics = model_state.get(AVERAGED, model_state[RUNNING])

    def forward(params, statistics, images):
        return model.apply({"params": params, RUNNING: statistics}, images)

    return _placed_by_the_compiler(forward, model.place("batch", None))(params, statistics, images)


def initial_statistics(model: ResNet, config: TrainConfig, *more: str) -> dict[str, PyTree]:
    """The statistics that a run begins with, in collections of their own.

    Args:
      model: the network.
      config: says whether they are averaged.
      more: names of further running statistics.
    """
    names = [RUNNING, *more, *([AVERAGED] if config.ema and config.ema_statistics else [])]
    return {name: init_model_state(model)[RUNNING] for name in names}


def running(
    model: ResNet, config: TrainConfig, model_state: dict[str, PyTree], sums: dict[str, PyTree], count: jax.Array
) -> dict[str, PyTree]:
    """The running statistics, and their average, after a step.

    Args:
      model: the network.
      config: of training.
      model_state: before the step.
      sums: by collection, statistics of the step's microbatches, summed with the rows that count as weights.
      count: such rows.
    """
    momentum = model.config.batch_norm_momentum

    def moved(decay: float, old: PyTree, new: PyTree) -> PyTree:
        return jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, old, new)

    new = {
        name: moved(momentum, model_state[name], jax.tree.map(lambda x: x / jnp.maximum(count, 1), total))
        for name, total in sums.items()
    }
    if AVERAGED in model_state:
        new[AVERAGED] = moved(config.ema, model_state[AVERAGED], new[RUNNING])
    return {**model_state, **new}


def _placed_by_the_compiler(function: Callable[..., Any], *specs: PartitionSpec | None) -> Callable[..., Any]:
    """``function`` with placements left to the compiler, since convolutions have no rules for them on an explicit mesh.

    What is a mean over rows within is then one over all replicas, as on a single device.

    Args:
      function: of arrays.
      specs: of its results; ``None``: there is no mesh.
    """
    if specs[0] is None:
        return function
    return jax.sharding.auto_axes(function, out_sharding=specs if len(specs) > 1 else specs[0])
