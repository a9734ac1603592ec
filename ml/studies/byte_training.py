"""A whole training of a small byte-level transformer as one program, for studies that need many of them."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int, PyTree

from ml.models import Transformer, TransformerConfig, init_params, logical_axes
from ml.optim import OptimizerConfig, ScheduleConfig, make_optimizer
from ml.studies.byte_text import VOCAB_SIZE
from ml.train.config import TrainConfig
from ml.train.objective import make_loss
from ml.train.objective_class import Metrics
from ml.train.state import TrainState
from ml.train.step import make_train_step


def byte_model(num_layers: int, embed_dim: int, num_heads: int, length: int) -> TransformerConfig:
    """A Llama-style decoder over the bytes of `ml.studies.byte_text`."""
    return TransformerConfig(
        vocab_size=VOCAB_SIZE,
        num_layers=num_layers,
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=embed_dim // num_heads,
        mlp_dim=8 * embed_dim // 3,
        max_length=length,
    )


class Stage(NamedTuple):
    """A part of a training: rows of one length, read once.

    Attributes:
      rows: ``[rows, length + 1]``, in an order that the seed draws.
      batch_size: in rows; what is left over is not read.
    """

    rows: Int[np.ndarray, "rows length+1"]
    batch_size: int

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return len(self.rows) // self.batch_size


def make_byte_training(
    config: TransformerConfig,
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
    stages: Sequence[Stage],
    heldout: Int[np.ndarray, "heldout_rows length+1"],
) -> Callable[[float, int], float]:
    """Returns ``(rate, seed) -> held-out loss``, in nats per byte, after the stages.

    The step is the shipped one. It is compiled once for all rates: the updates of LAMB, LARS, AdamW and SGD are
    proportional to the rate, so what they return is scaled by ``rate``.

    Args:
      config: the architecture.
      optimizer: its ``learning_rate`` must be 1.
      schedule: of the rate; it scales with the first stage's batch.
      stages: one after another, with one state.
      heldout: to test on.
    """
    trained = _training(config, optimizer, schedule, stages, TrainConfig(nonfinite="skip"))
    return lambda rate, seed: float(_loss(config, trained(rate, seed)[0], heldout))


def make_byte_curve(
    config: TransformerConfig, optimizer: OptimizerConfig, schedule: ScheduleConfig, stage: Stage, **train: Any
) -> Callable[[float, int], dict[str, np.ndarray]]:
    """Returns ``(rate, seed) -> metrics of the train step``, each ``[steps]``; trains as `make_byte_training` does.

    Rows are read once, so each step's training loss is one of text not seen before.

    Args:
      config, optimizer, schedule: as there.
      stage: the only one.
      train: further settings of `TrainConfig`: ``microbatches``, ``noise_scale``.
    """
    trained = _training(config, optimizer, schedule, [stage], TrainConfig(nonfinite="skip", **train))
    return lambda rate, seed: jax.device_get(trained(rate, seed)[1][0])


def _training(
    config: TransformerConfig,
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
    stages: Sequence[Stage],
    train: TrainConfig,
) -> Callable[[float, int], tuple[PyTree, list[Metrics]]]:
    """``(rate, seed) -> (parameters, metrics of each stage's steps)``; the batch size is the first stage's."""
    if optimizer.learning_rate != 1:
        raise ValueError(f"learning_rate={optimizer.learning_rate} must be 1: the rate is an argument of the training")
    size = stages[0].batch_size
    train = dataclasses.replace(train, batch_size=size)
    total_steps = sum(stage.steps for stage in stages)
    tx, rate_at = make_optimizer(
        optimizer, schedule, total_steps=total_steps, batch_size=size, axes=logical_axes(config)
    )

    @jax.jit
    def train_on(params, batches, rate):
        scaled = optax.chain(tx, optax.scale(rate))
        step, zero = make_train_step(Transformer(config), scaled, rate_at, train), jnp.zeros((), jnp.int32)
        state = TrainState(step=zero, params=params, opt_state=scaled.init(params), ema=None, skipped=zero)
        metrics = []
        for part in batches:
            state, of_steps = jax.lax.scan(lambda state, rows: step(state, _batch(rows)), state, part)
            metrics.append(of_steps)
        return state.params, metrics

    def training(rate: float, seed: int) -> tuple[PyTree, list[Metrics]]:
        order = np.random.default_rng(seed)
        batches = [
            order.permutation(stage.rows)[: stage.steps * stage.batch_size].reshape(
                stage.steps, train.microbatches, stage.batch_size // train.microbatches, -1
            )
            for stage in stages
        ]
        return train_on(_init(config, jax.random.key(seed)), batches, rate)

    return training


# Programs of their own, which all trainings of a model share.
@functools.partial(jax.jit, static_argnums=0)
def _init(config: TransformerConfig, key: jax.Array) -> PyTree:
    return init_params(Transformer(config), key)


@functools.partial(jax.jit, static_argnums=0)
def _loss(config: TransformerConfig, params: PyTree, rows: Int[jax.Array, "rows length+1"]) -> Float[jax.Array, ""]:
    """Cross-entropy, in nats per byte."""
    batch = _batch(rows)
    return make_loss(Transformer(config), TrainConfig())(params, batch)[1]["loss"] / batch["loss_mask"].sum()


def _batch(rows: Int[jax.Array, "... length+1"]) -> dict[str, Any]:
    """What the train step takes: each byte has the next one as its target, and a row is one document."""
    tokens = rows[..., :-1]
    return {
        "tokens": tokens,
        "targets": rows[..., 1:],
        "loss_mask": jnp.ones(tokens.shape, jnp.float32),
        "segment_ids": None,
        "positions": jnp.broadcast_to(jnp.arange(tokens.shape[-1]), tokens.shape),
    }
