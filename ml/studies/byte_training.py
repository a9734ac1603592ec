"""A whole training of a small byte-level transformer as one program, for studies that need many of them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int

from ml.models import Transformer, TransformerConfig, init_params, logical_axes
from ml.optim import OptimizerConfig, ScheduleConfig, make_optimizer
from ml.studies.byte_text import VOCAB_SIZE
from ml.train.config import TrainConfig
from ml.train.objective import make_loss
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

    The step is the shipped one. The program is compiled once for all rates: the updates of LAMB, LARS, AdamW and SGD
    are proportional to the rate, so what they return is scaled by ``rate``.

    Args:
      config: the architecture.
      optimizer: its ``learning_rate`` must be 1.
      schedule: of the rate; it scales with the first stage's batch.
      stages: one after another, with one state.
      heldout: to test on.
    """
    if optimizer.learning_rate != 1:
        raise ValueError(f"learning_rate={optimizer.learning_rate} must be 1: the rate is an argument of the training")
    size, model = stages[0].batch_size, Transformer(config)
    train = TrainConfig(batch_size=size, nonfinite="skip")
    total_steps = sum(stage.steps for stage in stages)
    tx, rate_at = make_optimizer(
        optimizer, schedule, total_steps=total_steps, batch_size=size, axes=logical_axes(config)
    )
    loss = make_loss(model, train)

    @jax.jit
    def training(rows, heldout, rate, seed) -> Float[jax.Array, ""]:
        parameters, *orders = jax.random.split(jax.random.key(seed), 1 + len(stages))
        scaled = optax.chain(tx, optax.scale(rate))
        step = make_train_step(model, scaled, rate_at, train)
        params, zero = init_params(model, parameters), jnp.zeros((), jnp.int32)
        state = TrainState(step=zero, params=params, opt_state=scaled.init(params), ema=None, skipped=zero)
        for stage, order, part in zip(stages, orders, rows, strict=True):
            read = jax.random.permutation(order, part)[: stage.steps * stage.batch_size]
            batches = read.reshape(stage.steps, 1, stage.batch_size, -1)
            state, _ = jax.lax.scan(lambda state, part: (step(state, _batch(part))[0], None), state, batches)
        batch = _batch(heldout)
        return loss(state.params, batch)[1]["loss"] / batch["loss_mask"].sum()

    rows, tested = jax.device_put(([stage.rows for stage in stages], heldout))
    return lambda rate, seed: float(training(rows, tested, rate, seed))


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
