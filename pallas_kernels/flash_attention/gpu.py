"""Attention on Hopper GPUs (Pallas, Mosaic GPU): the forward pass, and with `gpu_backward` a backend.

FlashAttention-3's schedule (Shah et al. 2024, section 3). A block has one warpgroup that copies keys and values into a
ring of shared memory and others that compute, each with rows of queries of its own. A computing warpgroup starts the
scores of a step before it multiplies in the values of the step before, so that its softmax runs beside that matmul. The
warpgroups take turns at the tensor cores, so that it runs beside the other's, too.

Why nothing is read too early or overwritten too early:

- A slot of the ring is written only when each computing warpgroup has arrived at its ``free`` barrier, and it does so
  once the matmul that reads the slot is complete (``wait_n`` below), not when it is started.
- A slot is read only after a wait on its ``ready`` barrier, which counts the bytes of the copy.
- Probabilities are stored only once the matmul that reads the step before's is complete: `acc[...]` waits for all.
  `commit_smem` then makes the store visible to the matmul that is started next.
- Matmuls complete in the order in which they were started. With the scores' first and the values' second, at most one
  under way means that the scores are there.
- The output goes into the memory of the queries once the last scores are complete, and its copy is awaited.
- A turn is passed only by the warpgroup whose turn it is, so none can be passed twice before it is taken.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.flash_attention import gpu_tiles as tiles
from pallas_kernels.flash_attention.gpu_backward import backward
from pallas_kernels.flash_attention.gpu_config import REGISTERS, GpuConfig, config_for, heuristic, why_not
from pallas_kernels.flash_attention.intervals import tile_bounds

# Below any logit, and yet a number: the difference of two such is 0.
_LOWEST = -1e30


def forward(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads head_dim"],
    intervals: Int[Array, "batch queries 2"],
    *,
    scale: float,
    softcap: float | None,
    out_dtype: Any = None,
    config: GpuConfig | None = None,
) -> tuple[Float[Array, "batch queries heads head_dim"], Float[Array, "batch queries heads"]]:
    """See `pallas_kernels.flash_attention.backend.Backend.forward`."""
    config = config_for(config, query, key, softcap)
    out_dtype = jnp.dtype(query.dtype if out_dtype is None else out_dtype)
    length, head_dim = query.shape[1::2]
    if not query.size or not key.size:
        return jnp.zeros(query.shape, out_dtype), jnp.full(query.shape[:-1], -jnp.inf)
    rows = config.block_q * config.warpgroups
    count = -(-length // rows)
    bounds = tile_bounds(jnp.asarray(intervals), rows, config.block_kv, key.shape[1])
    out, lse = _forward(
        tiles.whole(query),
        tiles.whole(key),
        tiles.whole(value),
        tiles.rows_of(intervals, key.shape[1], count * rows),
        tiles.scalars_of(bounds, -(-key.shape[1] // config.block_kv)),
        scale=scale,
        softcap=softcap,
        out_dtype=out_dtype,
        config=config,
    )
    return out[:, :length, :, :head_dim], lse[:, :, :length].transpose(0, 2, 1)


def _forward(query, key, value, intervals, bounds, *, scale, softcap, out_dtype, config):
    """On whole tiles; the output is padded as the query is, or to whole tiles if not of its type."""
    batch, length, heads, width = query.shape
    group = heads // key.shape[2]
    groups, rows, block_kv, stages = config.warpgroups, config.block_q, config.block_kv, config.stages
    count = bounds.shape[1]
    dtype = query.dtype
    computing_registers, copying_registers = REGISTERS[groups]
    copied_out = out_dtype == dtype

    def flash_forward(
        q_hbm, k_hbm, v_hbm, intervals_hbm, bounds_hbm, out_hbm, lse_hbm,
        q_smem, k_smem, v_smem, p_smem, lse_smem, intervals_smem,
        q_ready, k_ready, v_ready, k_free, v_free, turn,
    ):  # fmt: skip
        me = lax.axis_index("warpgroup")
        batch, kv_head = lax.axis_index("batch"), lax.axis_index("kv_head")
        head = kv_head * group + lax.axis_index("head")
        # The last queries of a causal row have the most to do, so they start first.
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
                for hbm, smem, ready, free in ((k_hbm, k_smem, k_ready, k_free), (v_hbm, v_smem, v_ready, v_free)):
                    tiles.wait_if(i >= stages, free.at[slot])
                    plgpu.copy_gmem_to_smem(hbm.at[at], smem.at[slot], ready.at[slot])

            lax.fori_loop(0, steps, step, None)
            tiles.drain((k_free, v_free), steps, stages)

        @pl.when(me < groups)
        def compute():
            tiles.set_registers(computing_registers, computes=True)
            base = q_tile * (groups * rows) + me * rows
            q, p, lse, my_intervals = (x.at[me] for x in (q_smem, p_smem, lse_smem, intervals_smem))
            plgpu.copy_gmem_to_smem(q_hbm.at[batch, pl.ds(base, rows), head], q, q_ready.at[me])
            plgpu.copy_gmem_to_smem(intervals_hbm.at[row_batch, :, pl.ds(base, rows)], my_intervals, q_ready.at[me])
            plgpu.barrier_wait(q_ready.at[me])
            bounds = [plgpu.load(my_intervals.at[i], layout=tiles.ROW) for i in range(2)]

            def take_turn():
                if config.take_turns and groups > 1:
                    plgpu.barrier_wait(turn.at[me])

            def pass_turn():
                if config.take_turns and groups > 1:
                    plgpu.barrier_arrive(turn.at[lax.rem(me + 1, jnp.int32(groups))])

            def softmax(products, i, peak, total):
                logits, _ = tiles.log2_logits(products, scale, softcap)
                tile = first + i
                shape = logits.shape

                def hidden(x):
                    return tiles.hide(x, bounds.__getitem__, tile * block_kv, keys_axis=1)

                logits = lax.cond((tile < first_full) | (tile >= last_full), hidden, lambda x: x, logits)
                higher = jnp.maximum(peak, logits.max(axis=1))
                weights = jnp.exp2(logits - tiles.spread(higher, shape, 0))
                decay = jnp.exp2(peak - higher)
                return weights.astype(dtype), higher, total * decay + weights.sum(axis=1), decay

            def hand_over(weights):
                """The left operand of the next step's matmul with values."""
                if config.registers:
                    return weights
                p[...] = weights
                plgpu.commit_smem()
                return ()

            def operand(handed):
                return handed if config.registers else p

            def row(value):
                return plgpu.layout_cast(jnp.full((rows,), value, jnp.float32), tiles.ROW)

            scores = plgpu.ACC((rows, block_kv), jnp.float32)

            def attend(acc):
                plgpu.barrier_wait(k_ready.at[0])
                pl.when(me == groups - 1)(pass_turn)  # to the first warpgroup, which has nobody before it

                def first_step(scores):
                    take_turn()
                    plgpu.wgmma(scores, q, tiles.transposed(k_smem.at[0]))
                    pass_turn()
                    products = scores[...]
                    plgpu.barrier_arrive(k_free.at[0])
                    weights, peak, total, _ = softmax(products, 0, row(_LOWEST), row(0.0))
                    return hand_over(weights), peak, total

                def next_step(i, carry):
                    handed, peak, total = carry
                    slot, before = lax.rem(i, jnp.int32(stages)), lax.rem(i - 1, jnp.int32(stages))
                    plgpu.barrier_wait(k_ready.at[slot])
                    plgpu.barrier_wait(v_ready.at[before])

                    def step(scores):
                        take_turn()
                        plgpu.wgmma(scores, q, tiles.transposed(k_smem.at[slot]))
                        plgpu.wgmma(acc, operand(handed), v_smem.at[before])
                        pass_turn()
                        products = plgpu.wgmma_accumulator_load(scores, wait_n=1)
                        plgpu.barrier_arrive(k_free.at[slot])
                        weights, higher, sums, decay = softmax(products, i, peak, total)
                        out = acc[...]
                        plgpu.barrier_arrive(v_free.at[before])
                        left = hand_over(weights)
                        acc[...] = out * tiles.spread(decay, out.shape, 0)
                        return left, higher, sums

                    return pl.run_scoped(step, scores)

                handed, peak, total = lax.fori_loop(1, steps, next_step, pl.run_scoped(first_step, scores))
                slot = lax.rem(steps - 1, jnp.int32(stages))
                plgpu.barrier_wait(v_ready.at[slot])
                plgpu.wgmma(acc, operand(handed), v_smem.at[slot])
                out = acc[...]
                plgpu.barrier_arrive(v_free.at[slot])
                return out, peak, total

            out, peak, total = pl.run_scoped(attend, plgpu.ACC((rows, width), jnp.float32))
            sees = total > 0
            total = jnp.where(sees, total, 1.0)
            lse[...] = jnp.where(sees, (peak + jnp.log2(total)) * (1 / tiles.LOG2_E), -jnp.inf)
            out = (out * tiles.spread(1.0 / total, out.shape, 0)).astype(out_dtype)
            plgpu.commit_smem()
            tiles.write(q, out_hbm.at[batch, pl.ds(base, rows), head], out, copied=copied_out)
            plgpu.copy_smem_to_gmem(lse, lse_hbm.at[batch, head, pl.ds(base, rows)])
            plgpu.wait_smem_to_gmem(0)
            pl.when(me == 0)(take_turn)  # the last that was passed, so that no barrier is left half-way

    padded = count * groups * rows
    return tiles.call(
        flash_forward,
        out_type=(
            jax.ShapeDtypeStruct((batch, length if copied_out else padded, heads, width), out_dtype),
            jax.ShapeDtypeStruct((batch, heads, padded), jnp.float32),
        ),
        scratch_types=[
            tiles.tile((groups, rows, width), dtype),
            tiles.tile((stages, block_kv, width), dtype),
            tiles.tile((stages, block_kv, width), dtype),
            tiles.tile((groups, 8, 64) if config.registers else (groups, rows, block_kv), dtype),
            plgpu.SMEM((groups, rows), jnp.float32),
            plgpu.SMEM((groups, 2, rows), jnp.int32),
            plgpu.Barrier(num_arrivals=2, num_barriers=groups),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
            plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
            plgpu.Barrier(num_barriers=groups),
        ],
        # The first axis varies fastest: the heads that share keys and values run side by side, and then the tiles of
        # queries that do, so that these are read from memory once.
        grid=(group, count, key.shape[2], batch),
        grid_names=("head", "q_tile", "kv_head", "batch"),
        num_threads=groups + 1,
        thread_name="warpgroup",
    )(query, key, value, intervals, bounds)


__all__ = ["GpuConfig", "backward", "forward", "heuristic", "why_not"]
