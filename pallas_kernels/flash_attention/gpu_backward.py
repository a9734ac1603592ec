"""Attention on Hopper GPUs, the backward pass: one kernel for the queries' gradient and one for the keys' and values'.

FlashAttention's recomputation (Dao 2023, algorithm 2) in the schedule of the forward pass (see `gpu`, also for why
nothing is read or overwritten too early). In two kernels each gradient is summed by one thread in one order, so the
results are the same bits every time; the heads that share keys and values are summed in the registers, in float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.flash_attention import gpu_tiles as tiles
from pallas_kernels.flash_attention.gpu_config import (
    COLUMNS,
    REGISTERS,
    ROWS,
    GpuConfig,
    config_for,
    padded_head_dim,
    splits_columns,
)
from pallas_kernels.flash_attention.intervals import tile_bounds, transposed_tile_bounds


def backward(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads head_dim"],
    lse: Float[Array, "batch queries heads"],
    delta: Float[Array, "batch queries heads"],
    out_gradient: Float[Array, "batch queries heads head_dim"],
    intervals: Int[Array, "batch queries 2"],
    *,
    scale: float,
    softcap: float | None,
    out_dtype: Any = None,
    config: GpuConfig | None = None,
) -> tuple[
    Float[Array, "batch queries heads head_dim"],
    Float[Array, "batch keys kv_heads head_dim"],
    Float[Array, "batch keys kv_heads head_dim"],
]:
    """See `pallas_kernels.flash_attention.backend.Backend.backward`."""
    config = config_for(config, query, key, softcap)
    out_dtype = jnp.dtype(query.dtype if out_dtype is None else out_dtype)
    (length, _, head_dim), keys = query.shape[1:], key.shape[1]
    if not query.size or not key.size:
        return tuple(jnp.zeros(x.shape, out_dtype) for x in (query, key, value))  # type: ignore[return-value]
    intervals = jnp.asarray(intervals)
    operands: Any = (query, key, value, out_gradient.astype(query.dtype))
    options: Any = {"scale": scale, "softcap": softcap, "out_dtype": out_dtype, "config": config}

    rows = ROWS * config.dq_warpgroups
    padded = -(-length // rows) * rows
    q, k, v, do = (tiles.whole(x) for x in operands)
    dq = _queries(
        q,
        k,
        v,
        do,
        _statistics(lse, delta, padded),
        tiles.rows_of(intervals, keys, padded),
        tiles.scalars_of(tile_bounds(intervals, rows, config.dq_block_kv, keys), -(-keys // config.dq_block_kv)),
        **options,
    )

    split, block_q = splits_columns(padded_head_dim(head_dim)), config.dkv_block_q
    columns = 256 if split else None
    padded = -(-length // block_q) * block_q
    bounds = transposed_tile_bounds(intervals, block_q, ROWS if split else 2 * ROWS, keys)
    q, k, v, do = (tiles.whole(x, columns) for x in operands)
    dk, dv = _keys(
        q,
        k,
        v,
        do,
        _statistics(lse, delta, padded),
        tiles.rows_of(intervals, keys, padded),
        tiles.scalars_of(bounds, padded // block_q),
        split=split,
        **options,
    )
    return dq[:, :length, :, :head_dim], dk[:, :keys, :, :head_dim], dv[:, :keys, :, :head_dim]


def _statistics(lse: jax.Array, delta: jax.Array, rows: int) -> jax.Array:
    """``[batch, heads, 2, rows]``: the log-sum-exp in units of ln 2, and delta.

    Rows that see nothing, and those beyond the queries, get the log-sum-exp +inf, and so the probabilities 0.
    """
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse * tiles.LOG2_E)
    extra = ((0, 0), (0, rows - lse.shape[1]), (0, 0))
    both = [jnp.pad(lse, extra, constant_values=jnp.inf), jnp.pad(delta, extra)]
    return jnp.stack(both, axis=-1).astype(jnp.float32).transpose(0, 2, 3, 1)


def _queries(query, key, value, out_gradient, statistics, intervals, bounds, *, scale, softcap, out_dtype, config):
    """dQ, in whole tiles."""
    batch, length, heads, width = query.shape
    group = heads // key.shape[2]
    groups, rows, block_kv, stages = config.dq_warpgroups, ROWS, config.dq_block_kv, config.dq_stages
    count = bounds.shape[1]
    dtype = query.dtype
    computing_registers, copying_registers = REGISTERS[groups]
    copied_out = out_dtype == dtype
    # With one slot a step's keys cannot be there while those of the step before are read.
    overlaps = stages > 1

    def flash_backward_queries(
        q_hbm, k_hbm, v_hbm, do_hbm, statistics_hbm, intervals_hbm, bounds_hbm, dq_hbm,
        q_smem, do_smem, k_smem, v_smem, ds_smem, statistics_smem, intervals_smem,
        q_ready, k_ready, v_ready, k_free, v_free,
    ):  # fmt: skip
        me = lax.axis_index("warpgroup")
        batch, kv_head = lax.axis_index("batch"), lax.axis_index("kv_head")
        head = kv_head * group + lax.axis_index("head")
        q_tile = count - 1 - lax.axis_index("q_tile")
        row_batch = batch if intervals.shape[0] > 1 else 0
        first, last, first_full, last_full = (bounds_hbm[row_batch, q_tile, i] for i in range(4))
        steps = last - first

        @pl.when(me == groups)
        def copy():
            tiles.set_registers(copying_registers, computes=False)

            def step(i, _):
                slot = lax.rem(i, jnp.int32(stages))
                at = (batch, pl.ds((first + i) * block_kv, block_kv), kv_head)
                # Values first: their slot is free first.
                for hbm, smem, ready, free in ((v_hbm, v_smem, v_ready, v_free), (k_hbm, k_smem, k_ready, k_free)):
                    tiles.wait_if(i >= stages, free.at[slot])
                    plgpu.copy_gmem_to_smem(hbm.at[at], smem.at[slot], ready.at[slot])

            lax.fori_loop(0, steps, step, None)
            tiles.drain((k_free, v_free), steps, stages)

        @pl.when(me < groups)
        def compute():
            tiles.set_registers(computing_registers, computes=True)
            base = q_tile * (groups * rows) + me * rows
            q, do, ds, my_statistics, my_intervals = (
                x.at[me] for x in (q_smem, do_smem, ds_smem, statistics_smem, intervals_smem)
            )
            here = pl.ds(base, rows)
            plgpu.copy_gmem_to_smem(q_hbm.at[batch, here, head], q, q_ready.at[me])
            plgpu.copy_gmem_to_smem(do_hbm.at[batch, here, head], do, q_ready.at[me])
            plgpu.copy_gmem_to_smem(statistics_hbm.at[batch, head, :, here], my_statistics, q_ready.at[me])
            plgpu.copy_gmem_to_smem(intervals_hbm.at[row_batch, :, here], my_intervals, q_ready.at[me])
            plgpu.barrier_wait(q_ready.at[me])

            def statistic(which):
                return plgpu.load(my_statistics.at[which], layout=tiles.ROW)

            def bound(which):
                return plgpu.load(my_intervals.at[which], layout=tiles.ROW)

            def gradient(products, dweights, i):
                """Of the products, but for the scale."""
                logits, slope = tiles.log2_logits(products, scale, softcap)
                tile, shape = first + i, logits.shape
                change = dweights - tiles.spread(statistic(1), shape, 0)
                change = change if slope is None else change * slope

                def hidden(x):
                    return tiles.hide(x, bound, tile * block_kv, keys_axis=1)

                logits = lax.cond((tile < first_full) | (tile >= last_full), hidden, lambda x: x, logits)
                return (jnp.exp2(logits - tiles.spread(statistic(0), shape, 0)) * change).astype(dtype)

            matrices = [plgpu.ACC((rows, block_kv), jnp.float32)] * 2

            def sum_up(acc):
                def next_step(i, before):
                    """``before``: the slot of the step whose product with the keys is still to be taken."""
                    slot, now = tiles.anew(lax.rem(i, jnp.int32(stages)), i), tiles.anew(me, i)
                    plgpu.barrier_wait(k_ready.at[slot])
                    plgpu.barrier_wait(v_ready.at[slot])

                    def step(scores, dweights):
                        plgpu.wgmma(scores, q_smem.at[now], tiles.transposed(k_smem.at[slot]))
                        plgpu.wgmma(dweights, do_smem.at[now], tiles.transposed(v_smem.at[slot]))
                        if before is not None:
                            plgpu.wgmma(acc, ds_smem.at[now], k_smem.at[before])
                        products = plgpu.wgmma_accumulator_load(scores, wait_n=0 if before is None else 1)
                        dproducts = plgpu.wgmma_accumulator_load(dweights, wait_n=None)
                        plgpu.barrier_arrive(v_free.at[slot])
                        new = gradient(products, dproducts, i)
                        if before is not None:
                            plgpu.wgmma_wait(0)
                            plgpu.barrier_arrive(k_free.at[before])
                        ds[...] = new
                        plgpu.commit_smem()

                    pl.run_scoped(step, *matrices)

                def finish(i):
                    slot = lax.rem(i, jnp.int32(stages))
                    plgpu.wgmma(acc, ds_smem.at[tiles.anew(me, i)], k_smem.at[slot])
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(k_free.at[slot])

                def alone(i, _):
                    next_step(i, None)
                    finish(i)

                if overlaps:
                    next_step(jnp.int32(0), None)
                    lax.fori_loop(1, steps, lambda i, _: next_step(i, lax.rem(i - 1, jnp.int32(stages))), None)
                    finish(steps - 1)
                else:
                    lax.fori_loop(0, steps, alone, None)
                return acc[...]

            dq = (pl.run_scoped(sum_up, plgpu.ACC((rows, width), jnp.float32)) * scale).astype(out_dtype)
            tiles.write(q, dq_hbm.at[batch, here, head], dq, copied=copied_out)
            plgpu.wait_smem_to_gmem(0)

    padded = count * groups * rows
    return tiles.call(
        flash_backward_queries,
        out_type=jax.ShapeDtypeStruct((batch, length if copied_out else padded, heads, width), out_dtype),
        scratch_types=[
            tiles.tile((groups, rows, width), dtype),
            tiles.tile((groups, rows, width), dtype),
            tiles.tile((stages, block_kv, width), dtype),
            tiles.tile((stages, block_kv, width), dtype),
            tiles.tile((groups, rows, block_kv), dtype),
            plgpu.SMEM((groups, 2, rows), jnp.float32),
            plgpu.SMEM((groups, 2, rows), jnp.int32),
            plgpu.Barrier(num_arrivals=4, num_barriers=groups),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
            plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
        ],
        grid=(group, count, key.shape[2], batch),
        grid_names=("head", "q_tile", "kv_head", "batch"),
        num_threads=groups + 1,
        thread_name="warpgroup",
    )(query, key, value, out_gradient, statistics, intervals, bounds)


def _keys(query, key, value, out_gradient, statistics, intervals, bounds, *, split, scale, softcap, out_dtype, config):
    """dK and dV, in whole tiles.

    Scores are computed transposed, keys by queries, so that what is summed stays in the registers of its warpgroup.
    With ``split`` two warpgroups share a tile of keys: each computes all its scores, and the sums of half of the
    columns.
    """
    batch, keys, kv_heads, width = key.shape
    group = query.shape[2] // kv_heads
    groups, rows, block_q, stages = 2, ROWS, config.dkv_block_q, config.dkv_stages
    shares = 1 if split else groups
    columns = width // groups if split else width
    count = bounds.shape[1]
    dtype = query.dtype
    computing_registers, copying_registers = REGISTERS[groups]
    copied_out = out_dtype == dtype

    def flash_backward_keys(
        q_hbm, k_hbm, v_hbm, do_hbm, statistics_hbm, intervals_hbm, bounds_hbm, dk_hbm, dv_hbm,
        q_smem, do_smem, k_smem, v_smem, p_smem, ds_smem, statistics_smem, intervals_smem,
        kv_ready, ready, free,
    ):  # fmt: skip
        me = lax.axis_index("warpgroup")
        batch, kv_head, kv_tile = lax.axis_index("batch"), lax.axis_index("kv_head"), lax.axis_index("kv_tile")
        row_batch = batch if intervals.shape[0] > 1 else 0
        first, last, first_full, last_full = (bounds_hbm[row_batch, kv_tile, i] for i in range(4))
        each = last - first  # the same tiles of queries for each head of the group
        steps = each * group

        @pl.when(me == groups)
        def copy():
            tiles.set_registers(copying_registers, computes=False)

            def step(i, _):
                slot = lax.rem(i, jnp.int32(stages))
                here = pl.ds((first + lax.rem(i, each)) * block_q, block_q)
                head = kv_head * group + lax.div(i, each)
                tiles.wait_if(i >= stages, free.at[slot])
                for source, target in (
                    (q_hbm.at[batch, here, head], q_smem),
                    (do_hbm.at[batch, here, head], do_smem),
                    (statistics_hbm.at[batch, head, :, here], statistics_smem),
                    (intervals_hbm.at[row_batch, :, here], intervals_smem),
                ):
                    plgpu.copy_gmem_to_smem(source, target.at[slot], ready.at[slot])

            lax.fori_loop(0, steps, step, None)
            tiles.drain((free,), steps, stages)

        @pl.when(me < groups)
        def compute():
            tiles.set_registers(computing_registers, computes=True)
            share = 0 if split else me
            base = kv_tile * (shares * rows) + share * rows
            here = pl.ds(base, rows)
            mine = pl.ds(me * columns, columns) if split else slice(None)
            k, v, p, ds = k_smem.at[share], v_smem.at[share], p_smem.at[me], ds_smem.at[me]

            def fetch():
                plgpu.copy_gmem_to_smem(k_hbm.at[batch, here, kv_head], k, kv_ready.at[share])
                plgpu.copy_gmem_to_smem(v_hbm.at[batch, here, kv_head], v, kv_ready.at[share])

            pl.when(me == 0)(fetch) if split else fetch()
            plgpu.barrier_wait(kv_ready.at[share])

            def gradient(products, dweights, i, slot, keep):
                """Of the products, but for the scale; hands the probabilities to ``keep``."""
                logits, slope = tiles.log2_logits(products, scale, softcap)
                tile, shape = first + lax.rem(i, each), logits.shape
                delta = plgpu.load(statistics_smem.at[slot, 1], layout=tiles.COLUMN)
                change = dweights - tiles.spread(delta, shape, 1)
                change = change if slope is None else change * slope

                def hidden(x):
                    def bounds(j):
                        return plgpu.load(intervals_smem.at[slot, j], layout=tiles.COLUMN)

                    return tiles.hide(x, bounds, base, keys_axis=0)

                logits = lax.cond((tile < first_full) | (tile >= last_full), hidden, lambda x: x, logits)
                lse = plgpu.load(statistics_smem.at[slot, 0], layout=tiles.COLUMN)
                weights = jnp.exp2(logits - tiles.spread(lse, shape, 1))
                keep(weights.astype(dtype))
                return (weights * change).astype(dtype)

            matrices = [plgpu.ACC((rows, block_q), jnp.float32)] * 2

            def sum_up(dk, dv):
                def add(slot, i):
                    now = tiles.anew(me, i)
                    plgpu.wgmma(dv, p_smem.at[now], do_smem.at[slot, :, mine])
                    plgpu.wgmma(dk, ds_smem.at[now], q_smem.at[slot, :, mine])

                def next_step(i, before):
                    now = tiles.anew(share, i)
                    slot = lax.rem(i, jnp.int32(stages))
                    plgpu.barrier_wait(ready.at[slot])

                    def step(scores, dweights):
                        plgpu.wgmma(scores, k_smem.at[now], tiles.transposed(q_smem.at[slot]))
                        plgpu.wgmma(dweights, v_smem.at[now], tiles.transposed(do_smem.at[slot]))
                        if before is not None:
                            add(before, i)
                        products = plgpu.wgmma_accumulator_load(scores, wait_n=0 if before is None else 2)
                        dproducts = plgpu.wgmma_accumulator_load(dweights, wait_n=None)

                        def keep(weights):
                            if before is not None:
                                plgpu.wgmma_wait(1)  # of `add`, what reads the probabilities
                            p[...] = weights

                        new = gradient(products, dproducts, i, slot, keep)
                        if before is not None:
                            plgpu.wgmma_wait(0)
                            plgpu.barrier_arrive(free.at[before])
                        ds[...] = new
                        plgpu.commit_smem()

                    pl.run_scoped(step, *matrices)

                next_step(jnp.int32(0), None)
                lax.fori_loop(1, steps, lambda i, _: next_step(i, lax.rem(i - 1, jnp.int32(stages))), None)
                slot = lax.rem(steps - 1, jnp.int32(stages))
                add(slot, steps)
                sums = dk[...], dv[...]
                plgpu.barrier_arrive(free.at[slot])
                return sums

            sums = [plgpu.ACC((rows, columns), jnp.float32)] * 2
            dk, dv = pl.run_scoped(sum_up, *sums)
            for hbm, values in ((dk_hbm, dk * scale), (dv_hbm, dv)):
                # In pieces that fit into the memory of probabilities, since that of the keys may still be read.
                for piece, staging in zip(range(0, columns, COLUMNS), (p, ds), strict=False):
                    at = (batch, here, kv_head, pl.ds(me * columns + piece if split else piece, COLUMNS))
                    part = values[:, piece : piece + COLUMNS].astype(out_dtype)
                    tiles.write(staging.at[:, :COLUMNS], hbm.at[at], part, copied=copied_out)
                plgpu.wait_smem_to_gmem(0)

    out = jax.ShapeDtypeStruct((batch, keys if copied_out else count * shares * rows, kv_heads, width), out_dtype)
    return tiles.call(
        flash_backward_keys,
        out_type=(out, out),
        scratch_types=[
            tiles.tile((stages, block_q, width), dtype),
            tiles.tile((stages, block_q, width), dtype),
            tiles.tile((shares, rows, width), dtype),
            tiles.tile((shares, rows, width), dtype),
            tiles.tile((groups, rows, block_q), dtype),
            tiles.tile((groups, rows, block_q), dtype),
            plgpu.SMEM((stages, 2, block_q), jnp.float32),
            plgpu.SMEM((stages, 2, block_q), jnp.int32),
            plgpu.Barrier(num_arrivals=2, num_barriers=shares),
            plgpu.Barrier(num_arrivals=4, num_barriers=stages),
            plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
        ],
        # The first keys of a causal row are seen by the most queries, so they start first.
        grid=(count, kv_heads, batch),
        grid_names=("kv_tile", "kv_head", "batch"),
        num_threads=groups + 1,
        thread_name="warpgroup",
    )(query, key, value, out_gradient, statistics, intervals, bounds)
