"""The forward kernel for TPUs: FlashAttention-2 (Dao 2023, algorithm 1) over the tiles that the intervals leave."""

import functools
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash_attention import tpu_tiles as tiles
from pallas_kernels.flash_attention.tpu_config import LANES, TpuConfig, blocks
from pallas_kernels.flash_attention.tpu_launch import (
    Specs,
    heads_first,
    launch,
    padded_intervals,
    queries_first,
    starts_and_counts,
    when_seen,
)
from pallas_kernels.flash_attention.tpu_scores import (
    LOG2E,
    NN,
    NO_PEAK,
    NT,
    along,
    capped,
    columns,
    dot,
    hide,
    lane_sums,
    prescaled,
    row_of,
)


def forward(query, key, value, intervals, *, scale: float, softcap: float | None, dtype: Any, config: TpuConfig):
    """See `pallas_kernels.flash_attention.tpu.forward`."""
    batch, queries, heads, width = query.shape
    keys, kv_heads = key.shape[1:3]
    block_q, block_kv = blocks(config, queries, keys)
    intervals = padded_intervals(intervals, block_q, keys)
    steps = tiles.steps(*tiles.visits(intervals, block_q, block_kv, keys))
    q = heads_first(prescaled(query, scale, softcap), block_q)
    k, v = heads_first(key, block_kv), heads_first(value, block_kv)
    specs = Specs(heads // kv_heads, block_q, block_kv, width)
    out, lse = launch(
        functools.partial(_kernel, softcap=softcap, config=config),
        "flash_attention_forward",
        steps,
        (batch if intervals.shape[0] == 1 else 1, heads, steps.count),
        (q, k, v, starts_and_counts(intervals)),
        [specs.queries(), specs.keys(), specs.keys(), specs.intervals()],
        [(q.shape, dtype), ((batch, heads, 1, q.shape[2]), jnp.float32)],
        [specs.queries(), specs.rows(1)],
        [
            *[pltpu.VMEM((block_q, LANES), jnp.float32)] * 2,
            pltpu.VMEM((block_q, width), jnp.float32),
            *[pltpu.VMEM((block_q, LANES), jnp.int32)] * 2,
        ],
    )
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

    @when_seen(step)
    def _(masked: bool):
        for row, rows in tiles.chunks(block_q, config.rows):
            r = slice(row, row + rows)
            for column, size in tiles.chunks(block_kv, config.columns):
                c = slice(column, column + size)
                scores, _ = capped(dot(q_ref[r], k_ref[c], NT), softcap)
                if masked:
                    first = tiles.minor_of(step) * block_kv + column
                    scores = hide(scores, 1, along(start_ref[r] - first, size), along(count_ref[r], size))
                peak = peak_ref[r]
                higher = jnp.maximum(peak, scores.max(axis=1, keepdims=True))
                weights = jnp.exp2(scores - along(higher, size))
                decay = jnp.exp2(peak - higher)
                peak_ref[r] = higher
                # The lanes' own sums: to add them up costs as much at the end as it would here.
                total_ref[r] = total_ref[r] * decay + lane_sums(weights)
                new = dot(weights.astype(v_ref.dtype), v_ref[c], NN)
                sum_ref[r] = sum_ref[r] * along(decay, width) + new

    @pl.when(step & tiles.LAST != 0)
    def _():
        total = jnp.broadcast_to(total_ref[...].sum(axis=1, keepdims=True), total_ref.shape)
        seen = total > 0
        total = jnp.where(seen, total, 1.0)
        out_ref[...] = (sum_ref[...] * along(1 / total, width)).astype(out_ref.dtype)
        lse = jnp.where(seen, peak_ref[...] * (1 / LOG2E) + jnp.log(total), -jnp.inf)
        for i in range(0, block_q, LANES):
            lse_ref[:, i : i + LANES] = row_of(lse[i : i + LANES])
