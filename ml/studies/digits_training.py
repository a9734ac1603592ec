"""A whole training of a small residual network on scikit-learn's digits as one program, for studies of many of them."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from ml.data import ImageDataConfig, heldout_batches, next_name, prepare
from ml.data.prepared import Batch
from ml.models import ResNet, ResNetConfig, init_params, logical_axes
from ml.optim import OptimizerConfig, ScheduleConfig, make_optimizer
from ml.train.config import TrainConfig
from ml.train.objective import make_objective
from ml.train.state import TrainState
from ml.train.step import make_train_step

CLASSES = 10


def digits_model(width: int, blocks: tuple[int, ...]) -> ResNetConfig:
    """A residual network of plain blocks for 8x8 grey pixels."""
    return ResNetConfig(
        num_classes=CLASSES,
        blocks=blocks,
        bottleneck=False,
        width=width,
        channels=1,
        stem="small",
        pixel_mean=(0.3,),
        pixel_std=(0.37,),
    )


@functools.cache
def digits(train_images: int | None = None) -> tuple[Batch, Batch]:
    """The first ``train_images`` of the training images (``None``: all) and the held-out ones, as batches."""
    prepared = prepare(ImageDataConfig(source="digits"), "")
    rows = prepared.train_rows if train_images is None else train_images
    train = next(iter(heldout_batches(prepared, global_batch_size=rows, side="train")))
    return train, next(iter(heldout_batches(prepared, global_batch_size=prepared.heldout_rows)))


@dataclasses.dataclass(frozen=True)
class Reading:
    """What one training reads.

    Attributes:
      batch_size: images.
      epochs: passes over the training images, each in an order of its own; what does not fill a batch goes over into
        the next epoch, and what does not fill the last one is left out.
      train_images: how many there are; ``None``: all.
    """

    batch_size: int
    epochs: int
    train_images: int | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return len(digits(self.train_images)[0]["images"]) * self.epochs // self.batch_size

    def batches(self, seed: int) -> Batch:
        """All batches, ``[steps, 1 microbatch, batch, ...]``, and the images and labels of each next one."""
        train, order = digits(self.train_images)[0], np.random.default_rng(seed)
        numbers = np.concatenate([order.permutation(len(train["images"])) for _ in range(self.epochs)])
        numbers = numbers[: self.steps * self.batch_size].reshape(self.steps, 1, self.batch_size)
        batches = {name: array[numbers] for name, array in train.items()}
        following = {next_name(name): np.roll(batches[name], -1, axis=0) for name in ("images", "targets")}
        return batches | following  # that of the last batch is of no use


def make_digits_training(
    config: ResNetConfig, optimizer: OptimizerConfig, schedule: ScheduleConfig, reading: Reading, **train: Any
) -> Callable[[float, int], Mapping[str, float]]:
    """Returns ``(rate, seed) -> figures``: ``loss`` (nats per image) and ``accuracy`` on the held-out images.

    The step is the shipped one. It is compiled once for all rates: the updates of LAMB, LARS and SGD are proportional
    to the rate, so what they return is scaled by ``rate``.

    Args:
      config: the architecture.
      optimizer: its ``learning_rate`` must be 1.
      schedule: of the rate.
      reading: which images, and how often.
      train: further settings of `TrainConfig`.
    """
    if optimizer.learning_rate != 1:
        raise ValueError(f"learning_rate={optimizer.learning_rate} must be 1: the rate is an argument of the training")
    trained = TrainConfig(steps=reading.steps, batch_size=reading.batch_size, remat="none", nonfinite="skip", **train)
    model = ResNet(config)
    tx, rate_at = make_optimizer(
        optimizer, schedule, total_steps=reading.steps, batch_size=reading.batch_size, axes=logical_axes(config)
    )
    objective = make_objective(model, trained)

    @jax.jit
    def train_and_test(params: PyTree, batches: Any, heldout: Any, rate: jax.Array) -> dict[str, jax.Array]:
        scaled = optax.chain(tx, optax.scale(rate))
        step, zero = make_train_step(model, scaled, rate_at, trained), jnp.zeros((), jnp.int32)
        carried = objective.carried(jax.tree.map(lambda x: x[0], batches))
        state = TrainState(zero, params, scaled.init(params), None, zero, objective.model_state(), carried)
        state, _ = jax.lax.scan(lambda state, batch: step(state, batch), state, batches)
        _, sums = objective.evaluation(state.params, state.model_state, heldout)
        return {name: sums[name] / heldout["loss_mask"].sum() for name in ("loss", "accuracy")}

    def training(rate: float, seed: int) -> Mapping[str, float]:
        figures = train_and_test(_init(config, jax.random.key(seed)), reading.batches(seed), digits()[1], rate)
        return {name: float(value) for name, value in figures.items()}

    return training


@functools.partial(jax.jit, static_argnums=0)
def _init(config: ResNetConfig, key: jax.Array) -> PyTree:
    return init_params(ResNet(config), key)
