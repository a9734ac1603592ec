"""What training carries from step to step, and how it comes to be on the mesh."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from ml.models import Transformer, init_params, logical_axes
from ml.parallel import Rules


@flax.struct.dataclass
class TrainState:
    """The state of a run, all of it in the checkpoint.

    Attributes:
      step: optimizer steps done, skipped ones included.
      params: float32.
      opt_state: of the optax transform.
      ema: moving average of ``params``, or ``None``.
      skipped: steps dropped for a NaN or infinity.
    """

    step: Int[Array, ""]
    params: PyTree
    opt_state: PyTree
    ema: PyTree | None
    skipped: Int[Array, ""]


def init_state(
    model: Transformer, tx: optax.GradientTransformation, rules: Rules, *, seed: int, ema: bool, params: Any = None
) -> TrainState:
    """Creates the state on the mesh, each device only its shards.

    Args:
      model: the model.
      tx: the optimizer.
      rules: where parameters go; optimizer state follows them.
      seed: of the random parameters.
      ema: whether to keep a moving average.
      params: parameters to start from instead of random ones, already placed.
    """
    if params is None:
        axes = logical_axes(model.config)
        shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
        create = jax.jit(lambda key: init_params(model, key), out_shardings=rules.shardings(axes, shapes))
        params = create(jax.random.key(seed))
    # `copy` gives the average buffers of its own: both are donated to the step.
    rest = jax.jit(lambda p: (tx.init(p), jax.tree.map(jnp.copy, p) if ema else None, jnp.zeros((2,), jnp.int32)))
    opt_state, average, zeros = rest(params)
    return TrainState(step=zeros[0], params=params, opt_state=opt_state, ema=average, skipped=zeros[1])
