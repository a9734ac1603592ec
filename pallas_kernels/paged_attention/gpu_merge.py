"""Merges the pieces of units that several workers or warpgroups added up, exactly, by their log-sum-exps."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.paged_attention.gpu_config import ROWS
from pallas_kernels.paged_attention.gpu_kernel import LOW
from pallas_kernels.paged_attention.gpu_plan import load

_WGMMA = plgpu.Layout.WGMMA
_ROW = _WGMMA.reduce(1)
_SLOTS = 4


def merge(
    out: Float[Array, "places warpgroups rows head_dim"],
    lse: Float[Array, "places warpgroups rows"],
    jobs: Int[Array, "jobs 2"],
    *,
    split: bool,
    interpret: Any,
) -> tuple[Float[Array, "jobs sheets rows head_dim"], Float[Array, "jobs sheets rows"]]:
    """Results of the jobs that have pieces; of others, undefined. Only pieces that jobs name are read.

    Args:
      out: of each piece, normalized.
      lse: of each piece, logarithm to the base of 2.
      jobs: first place and number of pieces, places side by side.
      split: the warpgroups' results of a piece are of the same rows, and are merged too.
    """
    places, warpgroups, rows, head_dim = out.shape
    sheets = 1 if split else warpgroups
    out = out.reshape(places * warpgroups, rows, head_dim)
    lse = lse.reshape(places * warpgroups, rows)
    step = 1 if split else warpgroups  # from a piece to the next
    times = warpgroups if split else 1
    width = 64 if head_dim == 192 else min(head_dim, 128)
    chunks = head_dim // width
    stored = pl.ds(0, rows)

    def body(out_ref, lse_ref, jobs_ref, to_ref, to_lse_ref, o_s, l_s, barrier):
        job, sheet, chunk = lax.axis_index("job"), lax.axis_index("sheet"), lax.axis_index("chunk")
        first = jobs_ref[job, 0] * warpgroups + sheet
        count = jobs_ref[job, 1] * times
        columns = pl.ds(chunk * width, width)

        def fetch(i):
            slot = lax.rem(i, jnp.int32(_SLOTS))
            piece = first + i * step
            plgpu.copy_gmem_to_smem(out_ref.at[piece, :, columns], o_s.at[pl.ds(slot * rows, rows)], barrier.at[slot])
            plgpu.copy_gmem_to_smem(lse_ref.at[piece], l_s.at[slot, stored], barrier.at[slot])

        for i in range(_SLOTS):

            @pl.when(i < count)
            def _(i=i):
                fetch(jnp.int32(i))

        def add(i, state):
            total, peak, weight = state
            slot = lax.rem(i, jnp.int32(_SLOTS))
            plgpu.barrier_wait(barrier.at[slot])
            # Rows beyond the stored ones hold anything (the next slots); they stay in their own rows.
            one = load(o_s.at[pl.ds(slot * rows, ROWS)], _WGMMA)
            its = load(l_s.at[slot], _ROW)
            highest = jnp.maximum(peak, its)
            decay, factor = jnp.exp2(peak - highest), jnp.exp2(its - highest)
            # A piece that saw nothing in a row stored 0 there.
            total = total * lax.broadcast_in_dim(decay, total.shape, [0]) + one * lax.broadcast_in_dim(
                factor, total.shape, [0]
            )

            # The loads above are done in every warp before the copy engine overwrites what they read.
            plgpu.commit_smem()

            @pl.when(i + _SLOTS < count)
            def _():
                fetch(i + _SLOTS)

            return total, highest, weight * decay + factor

        @pl.when(count > 0)
        def _():
            def fill(shape, x, layout):
                return plgpu.layout_cast(jnp.full(shape, x, jnp.float32), layout)

            state = (fill((ROWS, width), 0.0, _WGMMA), fill((ROWS,), LOW, _ROW), fill((ROWS,), 0.0, _ROW))
            total, peak, weight = lax.fori_loop(0, count, add, state)
            safe = jnp.where(weight > 0, weight, 1.0)
            o_s[:ROWS] = total * lax.broadcast_in_dim(1.0 / safe, total.shape, [0])
            l_s[0] = jnp.where(weight > 0, peak + jnp.log2(safe), -jnp.inf)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(o_s.at[stored], to_ref.at[job, sheet, :, columns])

            @pl.when(chunk == 0)
            def _():
                plgpu.copy_smem_to_gmem(l_s.at[0, stored], to_lse_ref.at[job, sheet])

            plgpu.wait_smem_to_gmem(0)

    options: dict[str, Any] = {} if interpret is None else {"interpret": interpret}
    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((jobs.shape[0], sheets, rows, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((jobs.shape[0], sheets, rows), jnp.float32),
        ),
        scratch_types=(
            plgpu.SMEM((_SLOTS * rows + ROWS - rows, width), jnp.float32),
            plgpu.SMEM((_SLOTS, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=_SLOTS),
        ),
        grid=(chunks, sheets, jobs.shape[0]),
        grid_names=("chunk", "sheet", "job"),
        kernel_name="paged_attention_merge",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **options,
    )(out, lse, jobs)
