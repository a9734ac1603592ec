"""Attention on TPUs, in Pallas: FlashAttention-2 (Dao 2023, algorithm 1) over the tiles that the intervals leave.

The scores of a tile are kept in base two and unscaled by anything but one factor, sums of weights stay spread over the
lanes until the end, and a tile that every query sees whole is multiplied without a mask: what is left per score is
little enough vector work to hide behind the matrix units (`scripts/kernel_schedule.py` shows the schedules).
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.flash_attention import tpu_tiles as tiles
from pallas_kernels.platform import platform

LANES = 128
VMEM_LIMIT = 100 * 2**20
LOG2E = math.log2(math.e)
# In base two. A row's peak begins above what a masked score is set to, so that the weight of a masked score is 0 also
# in a row that has seen nothing yet.
NO_PEAK, NO_SCORE = -1e30, -2e30

# Contraction of the last axes (scores), and the ordinary product.
NT, NN = (((1,), (1,)), ((), ())), (((1,), (0,)), ((), ()))


@dataclasses.dataclass(frozen=True)
class TpuConfig:
    """Sizes of tiles, each a multiple of 128; a shorter sequence is cut into smaller ones.

    A grid step holds ``block_q`` queries and ``block_kv`` keys in VMEM and multiplies ``rows`` queries with
    ``block_kv_compute`` keys at a time. Those of the two backward kernels are named alike.
    """

    block_q: int = 1024
    block_kv: int = 1024
    rows: int = 1024
    block_kv_compute: int = 512
    block_q_dq: int = 1024
    block_kv_dq: int = 1024
    rows_dq: int = 1024
    block_kv_dq_compute: int = 512
    block_q_dkv: int = 1024
    block_kv_dkv: int = 1024
    block_q_dkv_compute: int = 512
    rows_dkv: int = 1024

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            if size <= 0 or size % LANES:
                raise ValueError(f"{field.name}={size}: must be a positive multiple of {LANES}")


def forward(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads head_dim"],
    intervals: Int[Array, "1|batch queries 2"],
    *,
    scale: float,
    softcap: float | None,
    out_dtype: Any = None,
    config: TpuConfig | None = None,
) -> tuple[Float[Array, "batch queries heads head_dim"], Float[Array, "batch queries heads"]]:
    """Attention to the keys of each query's interval; see `pallas_kernels.flash_attention.flash_attention`.

    Returns:
      The output and the natural logarithm of the sum of the exponentiated logits (float32). A query that sees nothing
      has output 0 and logarithm -inf.

    Raises:
      ValueError: what `why_not` names, or blocks that do not fit the chip's VMEM.
    """
    config = TpuConfig() if config is None else config
    batch, queries, heads, width = query.shape
    keys, kv_heads = key.shape[1:3]
    group = heads // kv_heads
    block_q, block_kv = tiles.fit(queries, config.block_q), tiles.fit(keys, config.block_kv)
    intervals = padded_intervals(intervals, block_q, keys)
    steps = tiles.steps(*tiles.visits(intervals, block_q, block_kv, keys))
    q = heads_first(prescaled(query, scale, softcap), block_q)
    k, v = heads_first(key, block_kv), heads_first(value, block_kv)
    out_dtype = query.dtype if out_dtype is None else out_dtype
    padded = q.shape[2]

    def q_index(b, h, t, major, minor):
        return b + tiles.batch_of(major[t]), h, tiles.major_of(major[t]), 0

    def kv_index(b, h, t, major, minor):
        return b + tiles.batch_of(major[t]), jax.lax.div(h, group), tiles.minor_of(minor[t]), 0

    def row_index(b, h, t, major, minor):
        return b + tiles.batch_of(major[t]), h, 0, tiles.major_of(major[t])

    def interval_index(b, h, t, major, minor):
        return tiles.batch_of(major[t]), 0, tiles.major_of(major[t])

    kv_spec = pl.BlockSpec((None, None, block_kv, width), kv_index)
    out, lse = pl.pallas_call(
        functools.partial(_kernel, softcap=softcap, config=config),
        out_shape=(
            jax.ShapeDtypeStruct((batch, heads, padded, width), out_dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, padded), jnp.float32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch if intervals.shape[0] == 1 else 1, heads, steps.count),
            in_specs=[
                pl.BlockSpec((None, None, block_q, width), q_index),
                kv_spec,
                kv_spec,
                pl.BlockSpec((None, 2, block_q), interval_index),
            ],
            out_specs=(
                pl.BlockSpec((None, None, block_q, width), q_index),
                pl.BlockSpec((None, None, 1, block_q), row_index),
            ),
            scratch_shapes=[
                pltpu.VMEM((block_q, LANES), jnp.float32),
                pltpu.VMEM((block_q, LANES), jnp.float32),
                pltpu.VMEM((block_q, width), jnp.float32),
                pltpu.VMEM((block_q, LANES), jnp.int32),
                pltpu.VMEM((block_q, LANES), jnp.int32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=platform() != "tpu",
        name="flash_attention_forward",
    )(steps.major, steps.minor, q, k, v, starts_and_counts(intervals))
    return queries_first(out, queries), jnp.swapaxes(lse[:, :, 0, :queries], 1, 2)


def _kernel(
    major_ref,
    minor_ref,
    q_ref,
    k_ref,
    v_ref,
    interval_ref,
    out_ref,
    lse_ref,
    peak_ref,
    total_ref,
    sum_ref,
    start_ref,
    count_ref,
    *,
    softcap: float | None,
    config: TpuConfig,
):
    step = minor_ref[pl.program_id(2)]
    block_q, width = q_ref.shape
    block_kv = k_ref.shape[0]

    @pl.when(step & tiles.FIRST != 0)
    def _():
        peak_ref[...] = jnp.full_like(peak_ref, NO_PEAK)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        start_ref[...] = columns(interval_ref[0:1])
        count_ref[...] = columns(interval_ref[1:2])

    def attend(masked: bool):
        for row, rows in tiles.chunks(block_q, config.rows):
            r = slice(row, row + rows)
            for column, width_kv in tiles.chunks(block_kv, config.block_kv_compute):
                c = slice(column, column + width_kv)
                scores = capped(dot(q_ref[r], k_ref[c], NT), softcap)[0]
                if masked:
                    first = tiles.minor_of(step) * block_kv + column
                    scores = hide(scores, 1, along(start_ref[r] - first, width_kv), along(count_ref[r], width_kv))
                peak = peak_ref[r]
                higher = jnp.maximum(peak, scores.max(axis=1, keepdims=True))
                weights = jnp.exp2(scores - along(higher, width_kv))
                decay = jnp.exp2(peak - higher)
                peak_ref[r] = higher
                total_ref[r] = total_ref[r] * decay + lane_sums(weights)
                new = dot(weights.astype(v_ref.dtype), v_ref[c], NN)
                sum_ref[r] = sum_ref[r] * along(decay, width) + new

    @pl.when(step & tiles.FULL != 0)
    def _():
        attend(masked=False)

    @pl.when(step & tiles.MASKED != 0)
    def _():
        attend(masked=True)

    @pl.when(step & tiles.LAST != 0)
    def _():
        total = jnp.broadcast_to(total_ref[...].sum(axis=1, keepdims=True), total_ref.shape)
        seen = total > 0
        out = sum_ref[...] * along(1 / jnp.where(seen, total, 1.0), width)
        out_ref[...] = out.astype(out_ref.dtype)
        lse = jnp.where(seen, peak_ref[...] * (1 / LOG2E) + jnp.log(jnp.where(seen, total, 1.0)), -jnp.inf)
        for i in range(0, block_q, LANES):
            lse_ref[:, i : i + LANES] = row_of(lse[i : i + LANES])


def prescaled(query: Float[Array, "*shape"], scale: float, softcap: float | None) -> Float[Array, "*shape"]:
    """Queries whose products with keys are scores in base two, or the argument of soft-capping's tangent.

    One factor fewer per score; the rounding is that of the weights, which are of the operands' type as well.
    """
    factor = scale * LOG2E if softcap is None else scale / softcap
    return (query.astype(jnp.float32) * factor).astype(query.dtype)


def capped(product, softcap: float | None):
    """Scores in base two, and the tangent of soft-capping or None."""
    if softcap is None:
        return product, None
    bounded = jnp.tanh(product)
    return bounded * (softcap * LOG2E), bounded


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


def padded_intervals(
    intervals: Int[Array, "batch queries 2"], block_q: int, keys: int
) -> Int[Array, "batch padded_queries 2"]:
    """Whole tiles of queries, within the keys. Padding repeats the last row: its results are dropped."""
    intervals = jnp.clip(jnp.asarray(intervals, jnp.int32), 0, keys)
    return jnp.pad(intervals, ((0, 0), (0, -intervals.shape[1] % block_q), (0, 0)), mode="edge")


def starts_and_counts(intervals: Int[Array, "batch queries 2"]) -> Int[Array, "batch 2 queries"]:
    """First key that each query sees, and how many."""
    start, stop = intervals[..., 0], intervals[..., 1]
    return jnp.stack([start, jnp.maximum(stop - start, 0)], axis=1)


def heads_first(x: Float[Array, "batch rows heads *rest"], block: int) -> Float[Array, "batch heads padded_rows *rest"]:
    """Whole tiles of rows, the rest zeros; on a TPU the layout that the producer writes."""
    extra = -x.shape[1] % block
    x = jnp.swapaxes(x, 1, 2)
    return jnp.pad(x, ((0, 0), (0, 0), (0, extra), *((0, 0),) * (x.ndim - 3))) if extra else x


def queries_first(x: Float[Array, "batch heads padded_rows *rest"], rows: int) -> Float[Array, "batch rows heads *rest"]:
    """Back from `heads_first`."""
    return jnp.swapaxes(x[:, :, :rows], 1, 2)
