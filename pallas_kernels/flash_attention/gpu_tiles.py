"""What the GPU kernels share: tiles in shared memory, masks, logits, and operands brought to whole tiles."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.gpu_config import COLUMNS, padded_head_dim
from pallas_kernels.flash_attention.intervals import Tiles, clipped
from pallas_kernels.platform import platform

# Exponentials are powers of two: one instruction.
LOG2_E = math.log2(math.e)
# Of the result of a warpgroup's matmul, and of one value for each of its rows or columns.
MATRIX = plgpu.Layout.WGMMA
ROW, COLUMN = MATRIX.reduce(1), MATRIX.reduce(0)
# The copy engine is told the sequence in whole rows of its tiles.
_SWIZZLE_ROWS = 8


def tile(shape: tuple[int, ...], dtype: Any) -> Any:
    """A tile in shared memory that the copy engine writes and matmuls read."""
    pallas: Any = plgpu  # its transforms are abstract classes to a type checker
    transforms = (pallas.TilingTransform((_SWIZZLE_ROWS, COLUMNS)), pallas.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def transposed(ref: Any) -> Any:
    """A tile as the matmul's right operand, its rows contracted away."""
    if hasattr(plgpu, "wait_gmem_to_smem"):  # JAX 0.11
        return ref.transpose((1, 0))
    return plgpu.transpose_ref(ref, (1, 0))


def call(body: Any, **options: Any) -> Any:
    """``plgpu.kernel``, interpreted where the program is for no GPU."""
    if platform() != "gpu":
        from pallas_kernels.flash_attention import gpu_interpreter

        options["interpret"] = gpu_interpreter.params()
    params = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup)
    return plgpu.kernel(body, compiler_params=params, **options)


def set_registers(count: int, *, computes: bool) -> None:
    """Takes registers from the warpgroup that copies for those that compute."""
    if count < 255:
        plgpu.set_max_registers(count, action="increase" if computes else "decrease")


def wait_if(condition: Any, barrier: Any) -> None:
    """Waits for the barrier where the condition holds."""
    pl.when(condition)(lambda: plgpu.barrier_wait(barrier))


def drain(barriers: tuple[Any, ...], steps: Any, stages: int) -> None:
    """Waits until the last slots of a ring are free, so that no barrier is left half-way."""

    def step(i, _):
        for barrier in barriers:
            plgpu.barrier_wait(barrier.at[lax.rem(i, jnp.int32(stages))])

    lax.fori_loop(jnp.maximum(steps - stages, 0), steps, step, None)


def anew(index: Any, step: Any) -> Any:
    """The same index, in a form that differs between steps as far as a compiler can tell.

    Else it keeps the descriptors of all pieces of a tile, two registers each, from step to step, and for want of
    registers in memory; an addition apiece makes them anew.
    """
    return index + lax.shift_right_logical(step, jnp.int32(30))


def write(staging: Any, to: Any, values: Any, *, copied: bool) -> None:
    """Writes a warpgroup's results: ``copied`` by way of shared memory, which cuts them at the end, or else at once."""
    if not copied:
        to[...] = values
        return
    staging[...] = values
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging, to)


def hide(scores: Any, bounds: Callable[[int], Any], first_key: Any, *, keys_axis: int) -> Any:
    """-inf for scores of keys outside their queries' intervals.

    ``bounds`` gives the start (0) and the stop (1) of each query, one after the other, so that they need not be in
    registers at once.
    """
    key = plgpu.broadcasted_iota(jnp.int32, scores.shape, keys_axis, layout=MATRIX) + first_key
    scores = jnp.where(spread(bounds(0), scores.shape, 1 - keys_axis) <= key, scores, jnp.float32(-jnp.inf))
    return jnp.where(key < spread(bounds(1), scores.shape, 1 - keys_axis), scores, jnp.float32(-jnp.inf))


def log2_logits(products: Any, scale: float, softcap: float | None) -> tuple[Any, Any]:
    """Logits in units of ln 2, and the derivative of soft-capping, or ``None``."""
    if softcap is None:
        return products * (scale * LOG2_E), None
    # tanh x = 1 - 2 / (1 + exp 2x), the quotient as the square of a reciprocal root, which is one instruction. The
    # hardware's own tanh is good to 11 bits only, which a cap of 50 turns into 2% of a probability.
    root = lax.rsqrt(1.0 + jnp.exp2(products * (2.0 * scale * LOG2_E / softcap)))
    bounded = 1.0 - 2.0 * (root * root)
    return bounded * (softcap * LOG2_E), 1.0 - bounded * bounded


def spread(values: Any, shape: tuple[int, int], axis: int) -> Any:
    """One value for each row (axis 0) or column (axis 1) of a tile."""
    return lax.broadcast_in_dim(values, shape, [axis])


def whole(x: jax.Array, head_dim: int | None = None) -> jax.Array:
    """``[batch, length, heads, head_dim]`` in whole swizzles; beyond its end the copy engine fills up tiles with 0."""
    head_dim = padded_head_dim(x.shape[-1]) if head_dim is None else head_dim
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % _SWIZZLE_ROWS), (0, 0), (0, head_dim - x.shape[-1])))


def rows_of(intervals: jax.Array, keys: int, rows: int) -> jax.Array:
    """Intervals as ``[batch, 2, rows]``; the rows beyond the queries see nothing."""
    intervals = jnp.swapaxes(clipped(jnp.asarray(intervals, jnp.int32), keys), 1, 2)
    return jnp.pad(intervals, ((0, 0), (0, 0), (0, rows - intervals.shape[2])))


def scalars_of(tiles: Tiles, count: int) -> jax.Array:
    """Bounds as ``[batch, tiles, 4]``, with at least one tile to visit, so that every pipeline has a first step."""
    first = jnp.minimum(jnp.asarray(tiles.first), count - 1)
    last = jnp.maximum(jnp.asarray(tiles.last), first + 1)
    return jnp.stack([first, last, jnp.asarray(tiles.first_full), jnp.asarray(tiles.last_full)], -1).astype(jnp.int32)
