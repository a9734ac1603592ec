"""A whole training of a small byte-level transformer as one program, for studies that need many of them."""

from collections.abc import Callable
from typing import Any

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


def make_byte_training(
    config: TransformerConfig,
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
    batch_size: int,
    rows: Int[np.ndarray, "rows length+1"],
    heldout: Int[np.ndarray, "heldout_rows length+1"],
) -> Callable[[float, int], float]:
    """Returns ``(rate, seed) -> held-out loss``, in nats per byte, after one pass over ``rows``.

    The step is the shipped one. The program is compiled once for all rates: the updates of these optimizers are
    proportional to the rate, so what they return is scaled by ``rate``.

    Args:
      config: the architecture.
      optimizer: its ``learning_rate`` must be 1.
      schedule: of the rate.
      batch_size: in rows; what is left over is not read.
      rows: to train on, in an order that the seed draws.
      heldout: to test on.
    """
    if optimizer.learning_rate != 1:
        raise ValueError(f"learning_rate={optimizer.learning_rate} must be 1: the rate is an argument of the training")
    model, train = Transformer(config), TrainConfig(batch_size=batch_size, nonfinite="skip")
    steps = len(rows) // batch_size
    tx, rate_at = make_optimizer(
        optimizer, schedule, total_steps=steps, batch_size=batch_size, axes=logical_axes(config)
    )
    loss = make_loss(model, train)

    @jax.jit
    def training(rows, heldout, rate, seed) -> Float[jax.Array, ""]:
        parameters, order = jax.random.split(jax.random.key(seed))
        scaled = optax.chain(tx, optax.scale(rate))
        step = make_train_step(model, scaled, rate_at, train)
        params, zero = init_params(model, parameters), jnp.zeros((), jnp.int32)
        state = TrainState(step=zero, params=params, opt_state=scaled.init(params), ema=None, skipped=zero)
        parts = jax.random.permutation(order, rows)[: steps * batch_size].reshape(steps, 1, batch_size, -1)
        state, _ = jax.lax.scan(lambda state, part: (step(state, _batch(part))[0], None), state, parts)
        batch = _batch(heldout)
        return loss(state.params, batch)[1]["loss"] / batch["loss_mask"].sum()

    rows, heldout = jax.device_put((rows, heldout))
    return lambda rate, seed: float(training(rows, heldout, rate, seed))


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
