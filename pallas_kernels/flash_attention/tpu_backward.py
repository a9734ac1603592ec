"""Gradients of `tpu.forward` (Dao 2023, algorithm 2) in two kernels, so that no sum depends on the order of execution.

One kernel sums over keys for each tile of queries, the other over queries, and over the heads that share a key, for
each tile of keys. The second holds scores transposed, ``[keys, queries]``: then no operand of its four products is.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.flash_attention import tpu
from pallas_kernels.flash_attention import tpu_tiles as tiles
from pallas_kernels.flash_attention.tpu import LANES, LOG2E, NN, NT, TpuConfig, along, capped, columns, dot, hide
from pallas_kernels.platform import platform


def backward(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads head_dim"],
    lse: Float[Array, "batch queries heads"],
    delta: Float[Array, "batch queries heads"],
    out_gradient: Float[Array, "batch queries heads head_dim"],
    intervals: Int[Array, "1|batch queries 2"],
    *,
    scale: float,
    softcap: float | None,
    out_dtype: Any = None,
    config: TpuConfig | None = None,
) -> tuple[
    Float[Array, "batch queries heads head_dim"],
    Float[Array, "batch keys kv_heads head_dim"],
    Float[Array, "batch keys kv_heads head_dim"],
]:
    """Gradients with respect to query, key and value.

    Args:
      query, key, value, intervals, scale, softcap, config: as in `pallas_kernels.flash_attention.tpu.forward`.
      lse: of all keys that a query sees, natural logarithm; these keys may be a part of them.
      delta: ``rowsum(out * out_gradient)`` less the gradient of ``lse``.
      out_gradient: with respect to the output.
      out_dtype: of the results; ``None``: that of the operand.
    """
    config = TpuConfig() if config is None else config
    operands = (
        tpu.prescaled(query, scale, softcap),
        key,
        value,
        out_gradient.astype(value.dtype),
        # A query that sees nothing has weights 0, whatever is subtracted from its scores.
        jnp.stack([jnp.where(jnp.isneginf(lse), 0.0, lse) * LOG2E, delta], axis=-1).astype(jnp.float32),
    )
    dtypes = [x.dtype if out_dtype is None else out_dtype for x in (query, key, value)]
    import os
    if os.environ.get("FUSED"):
        return _fused(*operands, intervals, scale=scale, factor=1 / LOG2E if softcap is None else softcap, softcap=softcap, dtypes=dtypes, config=config)
    dq = _query_gradient(*operands, intervals, scale=scale, softcap=softcap, dtype=dtypes[0], config=config)
    # Queries went in scaled by all but this.
    factor = 1 / LOG2E if softcap is None else softcap
    dk, dv = _key_gradients(*operands, intervals, factor=factor, softcap=softcap, dtypes=dtypes[1:], config=config)
    return dq, dk, dv


def _query_gradient(query, key, value, out_gradient, rows, intervals, *, scale, softcap, dtype, config):
    batch, queries, heads, width = query.shape
    keys, kv_heads = key.shape[1:3]
    group = heads // kv_heads
    block_q, block_kv = tiles.fit(queries, config.block_q_dq), tiles.fit(keys, config.block_kv_dq)
    intervals = tpu.padded_intervals(intervals, block_q, keys)
    steps = tiles.steps(*tiles.visits(intervals, block_q, block_kv, keys))
    q, dout, rows = (tpu.heads_first(x, block_q) for x in (query, out_gradient, rows))
    k, v = (tpu.heads_first(x, block_kv) for x in (key, value))

    def q_index(b, h, t, major, minor):
        return b + tiles.batch_of(major[t]), h, tiles.major_of(major[t]), 0

    def kv_index(b, h, t, major, minor):
        return b + tiles.batch_of(major[t]), jax.lax.div(h, group), tiles.minor_of(minor[t]), 0

    def row_index(b, h, t, major, minor):
        return b + tiles.batch_of(major[t]), h, 0, tiles.major_of(major[t])

    def interval_index(b, h, t, major, minor):
        return tiles.batch_of(major[t]), 0, tiles.major_of(major[t])

    q_spec = pl.BlockSpec((None, None, block_q, width), q_index)
    kv_spec = pl.BlockSpec((None, None, block_kv, width), kv_index)
    dq = pl.pallas_call(
        functools.partial(_query_kernel, scale=scale, softcap=softcap, config=config),
        out_shape=jax.ShapeDtypeStruct(q.shape, dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch if intervals.shape[0] == 1 else 1, heads, steps.count),
            in_specs=[
                q_spec,
                kv_spec,
                kv_spec,
                q_spec,
                pl.BlockSpec((None, None, 2, block_q), row_index),
                pl.BlockSpec((None, 2, block_q), interval_index),
            ],
            out_specs=q_spec,
            scratch_shapes=[
                pltpu.VMEM((block_q, width), jnp.float32),
                *[pltpu.VMEM((block_q, LANES), jnp.float32)] * 2,
                *[pltpu.VMEM((block_q, LANES), jnp.int32)] * 2,
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=tpu.VMEM_LIMIT
        ),
        interpret=platform() != "tpu",
        name="flash_attention_dq",
    )(steps.major, steps.minor, q, k, v, dout, jnp.swapaxes(rows, 2, 3), tpu.starts_and_counts(intervals))
    return tpu.queries_first(dq, queries)


def _query_kernel(
    major_ref,
    minor_ref,
    q_ref,
    k_ref,
    v_ref,
    dout_ref,
    rows_ref,
    interval_ref,
    dq_ref,
    sum_ref,
    lse_ref,
    delta_ref,
    start_ref,
    count_ref,
    *,
    scale: float,
    softcap: float | None,
    config: TpuConfig,
):
    step = minor_ref[pl.program_id(2)]
    block_q, block_kv = q_ref.shape[0], k_ref.shape[0]

    @pl.when(step & tiles.FIRST != 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)
        lse_ref[...] = columns(rows_ref[0:1])
        delta_ref[...] = columns(rows_ref[1:2])
        start_ref[...] = columns(interval_ref[0:1])
        count_ref[...] = columns(interval_ref[1:2])

    def add(masked: bool):
        for row, rows in tiles.chunks(block_q, config.rows_dq):
            r = slice(row, row + rows)
            for column, size in tiles.chunks(block_kv, config.block_kv_dq_compute):
                c = slice(column, column + size)
                scores, bounded = capped(dot(q_ref[r], k_ref[c], NT), softcap)
                if masked:
                    first = tiles.minor_of(step) * block_kv + column
                    scores = hide(scores, 1, along(start_ref[r] - first, size), along(count_ref[r], size))
                weights = jnp.exp2(scores - along(lse_ref[r], size))
                dweights = dot(dout_ref[r], v_ref[c], NT)
                dscores = _dscores(weights, dweights, along(delta_ref[r], size), bounded)
                sum_ref[r] += dot(dscores.astype(k_ref.dtype), k_ref[c], NN)

    _when(step, add)

    @pl.when(step & tiles.LAST != 0)
    def _():
        dq_ref[...] = (sum_ref[...] * scale).astype(dq_ref.dtype)


def _key_gradients(query, key, value, out_gradient, rows, intervals, *, factor, softcap, dtypes, config):
    batch, queries, heads, width = query.shape
    keys, kv_heads = key.shape[1:3]
    group = heads // kv_heads
    block_q, block_kv = tiles.fit(queries, config.block_q_dkv), tiles.fit(keys, config.block_kv_dkv)
    intervals = tpu.padded_intervals(intervals, block_q, keys)
    visit, full = tiles.visits(intervals, block_q, block_kv, keys)
    steps = tiles.steps(jnp.swapaxes(visit, 1, 2), jnp.swapaxes(full, 1, 2))
    q, dout, rows = (tpu.heads_first(x, block_q) for x in (query, out_gradient, rows))
    k, v = (tpu.heads_first(x, block_kv) for x in (key, value))

    def q_index(b, g, t, n, major, minor):
        return b + tiles.batch_of(major[t]), g * group + n, tiles.minor_of(minor[t]), 0

    def kv_index(b, g, t, n, major, minor):
        return b + tiles.batch_of(major[t]), g, tiles.major_of(major[t]), 0

    def row_index(b, g, t, n, major, minor):
        return b + tiles.batch_of(major[t]), g * group + n, 0, tiles.minor_of(minor[t])

    def interval_index(b, g, t, n, major, minor):
        return tiles.batch_of(major[t]), 0, tiles.minor_of(minor[t])

    q_spec = pl.BlockSpec((None, None, block_q, width), q_index)
    kv_spec = pl.BlockSpec((None, None, block_kv, width), kv_index)
    gradients = pl.pallas_call(
        functools.partial(_key_kernel, factor=factor, softcap=softcap, config=config),
        out_shape=[jax.ShapeDtypeStruct(k.shape, dtype) for dtype in dtypes],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch if intervals.shape[0] == 1 else 1, kv_heads, steps.count, group),
            in_specs=[
                q_spec,
                kv_spec,
                kv_spec,
                q_spec,
                pl.BlockSpec((None, None, 2, block_q), row_index),
                pl.BlockSpec((None, 2, block_q), interval_index),
            ],
            out_specs=[kv_spec, kv_spec],
            scratch_shapes=[pltpu.VMEM((block_kv, width), jnp.float32)] * 2,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=tpu.VMEM_LIMIT
        ),
        interpret=platform() != "tpu",
        name="flash_attention_dkv",
    )(steps.major, steps.minor, q, k, v, dout, jnp.swapaxes(rows, 2, 3), tpu.starts_and_counts(intervals))
    return tuple(tpu.queries_first(x, keys) for x in gradients)


def _key_kernel(
    major_ref,
    minor_ref,
    q_ref,
    k_ref,
    v_ref,
    dout_ref,
    rows_ref,
    interval_ref,
    dk_ref,
    dv_ref,
    dk_sum_ref,
    dv_sum_ref,
    *,
    factor: float,
    softcap: float | None,
    config: TpuConfig,
):
    index, head = pl.program_id(2), pl.program_id(3)
    step = minor_ref[index]
    block_q, block_kv = q_ref.shape[0], k_ref.shape[0]

    @pl.when((step & tiles.FIRST != 0) & (head == 0))
    def _():
        dk_sum_ref[...] = jnp.zeros_like(dk_sum_ref)
        dv_sum_ref[...] = jnp.zeros_like(dv_sum_ref)

    def add(masked: bool):
        for row, rows in tiles.chunks(block_kv, config.rows_dkv):
            r = slice(row, row + rows)
            for column, size in tiles.chunks(block_q, config.block_q_dkv_compute):
                c = slice(column, column + size)
                scores, bounded = capped(dot(k_ref[r], q_ref[c], NT), softcap)
                if masked:
                    first = tiles.major_of(major_ref[index]) * block_kv + row
                    scores = hide(scores, 0, interval_ref[0:1, c] - first, interval_ref[1:2, c])
                weights = jnp.exp2(scores - rows_ref[0:1, c])
                dv_sum_ref[r] += dot(weights.astype(dout_ref.dtype), dout_ref[c], NN)
                dweights = dot(v_ref[r], dout_ref[c], NT)
                dscores = _dscores(weights, dweights, rows_ref[1:2, c], bounded)
                dk_sum_ref[r] += dot(dscores.astype(q_ref.dtype), q_ref[c], NN)

    _when(step, add)

    @pl.when((step & tiles.LAST != 0) & (head == pl.num_programs(3) - 1))
    def _():
        dk_ref[...] = (dk_sum_ref[...] * factor).astype(dk_ref.dtype)
        dv_ref[...] = dv_sum_ref[...].astype(dv_ref.dtype)


def _dscores(weights, dweights, delta, bounded):
    """The Jacobian of softmax, ``dS = P * (dP - D)``, and that of soft-capping."""
    dscores = weights * (dweights - delta)
    return dscores if bounded is None else dscores * (1 - bounded * bounded)


def _when(step, add):
    pl.when(step & tiles.FULL != 0)(lambda: add(masked=False))
    pl.when(step & tiles.MASKED != 0)(lambda: add(masked=True))


TN = (((0,), (0,)), ((), ()))


def _fused(query, key, value, out_gradient, rows, intervals, *, scale, factor, softcap, dtypes, config):
    batch, queries, heads, width = query.shape
    keys, kv_heads = key.shape[1:3]
    group = heads // kv_heads
    block_q, block_kv = tiles.fit(queries, config.block_q_dkv), tiles.fit(keys, config.block_kv_dkv)
    intervals = tpu.padded_intervals(intervals, block_q, keys)
    steps = tiles.steps(*tiles.visits(intervals, block_q, block_kv, keys))
    q, dout, rows = (tpu.heads_first(x, block_q) for x in (query, out_gradient, rows))
    k, v = (tpu.heads_first(x, block_kv) for x in (key, value))

    def q_index(b, g, t, n, major, minor):
        return b + tiles.batch_of(major[t]), g * group + n, tiles.major_of(major[t]), 0

    def group_index(b, g, t, n, major, minor):
        return b + tiles.batch_of(major[t]), g, tiles.major_of(major[t]), 0

    def kv_index(b, g, t, n, major, minor):
        return b + tiles.batch_of(major[t]), g, tiles.minor_of(minor[t]), 0

    def keys_index(b, g, t, n, major, minor):
        return b + tiles.batch_of(major[t]), g, 0, 0

    def row_index(b, g, t, n, major, minor):
        return b + tiles.batch_of(major[t]), g * group + n, 0, tiles.major_of(major[t])

    def interval_index(b, g, t, n, major, minor):
        return tiles.batch_of(major[t]), 0, tiles.major_of(major[t])

    q_spec = pl.BlockSpec((None, None, block_q, width), q_index)
    kv_spec = pl.BlockSpec((None, None, block_kv, width), kv_index)
    keys_spec = pl.BlockSpec((None, None, k.shape[2], width), keys_index)
    dq, dk, dv = pl.pallas_call(
        functools.partial(_fused_kernel, scale=scale, factor=factor, softcap=softcap, config=config),
        out_shape=[jax.ShapeDtypeStruct(x.shape, dtype) for x, dtype in zip((q, k, v), dtypes, strict=True)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch if intervals.shape[0] == 1 else 1, kv_heads, steps.count, group),
            in_specs=[
                q_spec,
                kv_spec,
                kv_spec,
                q_spec,
                pl.BlockSpec((None, None, 2, block_q), row_index),
                pl.BlockSpec((None, 2, block_q), interval_index),
            ],
            out_specs=[pl.BlockSpec((None, group, block_q, width), group_index), keys_spec, keys_spec],
            scratch_shapes=[
                pltpu.VMEM((group, block_q, width), jnp.float32),
                *[pltpu.VMEM((k.shape[2], width), jnp.float32)] * 2,
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=tpu.VMEM_LIMIT
        ),
        interpret=platform() != "tpu",
        name="flash_attention_backward",
    )(steps.major, steps.minor, q, k, v, dout, jnp.swapaxes(rows, 2, 3), tpu.starts_and_counts(intervals))
    return tpu.queries_first(dq, queries), tpu.queries_first(dk, keys), tpu.queries_first(dv, keys)


def _fused_kernel(
    major_ref,
    minor_ref,
    q_ref,
    k_ref,
    v_ref,
    dout_ref,
    rows_ref,
    interval_ref,
    dq_ref,
    dk_ref,
    dv_ref,
    dq_sum_ref,
    dk_sum_ref,
    dv_sum_ref,
    *,
    scale: float,
    factor: float,
    softcap: float | None,
    config: TpuConfig,
):
    step, head = minor_ref[pl.program_id(2)], pl.program_id(3)
    block_q, block_kv = q_ref.shape[0], k_ref.shape[0]
    tile = tiles.minor_of(step) * block_kv

    @pl.when((step & tiles.ENTRY_FIRST != 0) & (head == 0))
    def _():
        @pl.loop(0, dk_sum_ref.shape[0], step=block_kv)
        def _(i):
            dk_sum_ref[pl.ds(i, block_kv)] = jnp.zeros((block_kv, k_ref.shape[1]), jnp.float32)
            dv_sum_ref[pl.ds(i, block_kv)] = jnp.zeros((block_kv, k_ref.shape[1]), jnp.float32)

    @pl.when(step & tiles.FIRST != 0)
    def _():
        dq_sum_ref[head] = jnp.zeros(dq_sum_ref.shape[1:], jnp.float32)

    def add(masked: bool):
        for row, rows in tiles.chunks(block_kv, config.rows_dkv):
            r, to = slice(row, row + rows), pl.ds(tile + row, rows)
            for column, size in tiles.chunks(block_q, config.block_q_dkv_compute):
                c = slice(column, column + size)
                scores, bounded = capped(dot(k_ref[r], q_ref[c], NT), softcap)
                if masked:
                    scores = hide(scores, 0, interval_ref[0:1, c] - (tile + row), interval_ref[1:2, c])
                weights = jnp.exp2(scores - rows_ref[0:1, c])
                dv_sum_ref[to] += dot(weights.astype(dout_ref.dtype), dout_ref[c], NN)
                dweights = dot(v_ref[r], dout_ref[c], NT)
                dscores = _dscores(weights, dweights, rows_ref[1:2, c], bounded).astype(q_ref.dtype)
                dk_sum_ref[to] += dot(dscores, q_ref[c], NN)
                dq_sum_ref[head, c] += dot(dscores, k_ref[r], TN)

    _when(step, add)

    @pl.when(step & tiles.LAST != 0)
    def _():
        dq_ref[head] = (dq_sum_ref[head] * scale).astype(dq_ref.dtype)

    @pl.when((step & tiles.ENTRY_LAST != 0) & (head == pl.num_programs(3) - 1))
    def _():
        @pl.loop(0, dk_sum_ref.shape[0], step=block_kv)
        def _(i):
            to = pl.ds(i, block_kv)
            dk_ref[to] = (dk_sum_ref[to] * factor).astype(dk_ref.dtype)
            dv_ref[to] = dv_sum_ref[to].astype(dv_ref.dtype)
