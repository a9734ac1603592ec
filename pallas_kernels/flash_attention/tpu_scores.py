"""What the TPU kernels have in common: scores in base two, their masks, and statistics of rows.

Base two saves the multiplication that every exponential would cost, and the scale is multiplied into the queries: what
is left of vector work per score is little enough to hide behind the matrix units (`scripts/kernel_schedule.py`).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.flash_attention.tpu_config import LANES

LOG2E = math.log2(math.e)
# A row's peak begins above what a masked score is set to, so that the weight of a masked score is 0 also in a row that
# has seen nothing yet.
NO_PEAK, NO_SCORE = -1e30, -2e30

# Contractions: of the last axes (scores), the ordinary product, and of the first axes.
NT, NN, TN = (((1,), (1,)), ((), ())), (((1,), (0,)), ((), ())), (((0,), (0,)), ((), ()))


def prescaled(query: Float[Array, "*shape"], scale: float, softcap: float | None) -> Float[Array, "*shape"]:
    """Queries whose products with keys are scores in base two, or the argument of soft-capping's tangent.

    One factor fewer per score; the rounding is that of the weights, which are of the operands' type as well.
    """
    factor = scale * LOG2E if softcap is None else scale / softcap
    return (query.astype(jnp.float32) * factor).astype(query.dtype)


def key_factor(softcap: float | None) -> float:
    """What a key's gradient lacks when it was summed with prescaled queries."""
    return 1 / LOG2E if softcap is None else softcap


def capped(product, softcap: float | None):
    """Scores in base two, and the tangent of soft-capping or None."""
    if softcap is None:
        return product, None
    bounded = jnp.tanh(product)
    return bounded * (softcap * LOG2E), bounded


def dscores_of(weights, dweights, delta, bounded):
    """Gradient of scores before their scale: the Jacobian of softmax, ``P * (dP - D)``, and of soft-capping."""
    dscores = weights * (dweights - delta)
    return dscores if bounded is None else dscores * (1 - bounded * bounded)


def hide(scores, key_axis: int, start, count):
    """Scores with those set to `NO_SCORE` whose key is not among the ``count`` from ``start`` on."""
    key = jax.lax.broadcasted_iota(jnp.int32, scores.shape, key_axis)
    # One comparison in place of two: a key before the start is a huge unsigned number.
    seen = (key - start).astype(jnp.uint32) < count.astype(jnp.uint32)
    return jnp.where(seen, scores, NO_SCORE)


def dot(x, y, dimensions):
    """Products of float32 operands keep their precision; the unit's own is bfloat16."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)


def along(x, width: int):
    """``[rows, 128]``, the same in all lanes, as ``[rows, width]``."""
    if width % LANES == 0:
        return jnp.tile(x, (1, width // LANES))
    return jnp.tile(x, (1, -(-width // LANES)))[:, :width]


def lane_sums(x):
    """``[rows, n * 128]`` summed to ``[rows, 128]``: what is left is summed once, at the end."""
    return functools.reduce(jnp.add, [x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)])


def columns(row):
    """``[1, rows]`` as ``[rows, 128]``, the same in all lanes."""
    parts = [row[:, i : i + LANES] for i in range(0, row.shape[1], LANES)]
    return jnp.concatenate([jnp.broadcast_to(x, (LANES, LANES)).T for x in parts])


def row_of(column):
    """``[128, 128]``, the same in all lanes, as ``[1, 128]``."""
    shape = (LANES, LANES)
    diagonal = jax.lax.broadcasted_iota(jnp.int32, shape, 0) == jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return jnp.where(diagonal, column, 0.0).sum(axis=0, keepdims=True)
