"""Gradients on TPUs from one kernel (Dao 2023, algorithm 2), the same bits every time.

The steps of a head run in order, so every sum has one order too. Tiles of queries come one after the other, each with
the keys that it sees: the sum of the query's gradient is complete when its tile is, those of the keys stay in VMEM for
all of them, and for the heads that share the keys. Scores are held as ``[keys, queries]``, so that only one operand of
the five products has to be transposed.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash_attention import tpu_split_backward
from pallas_kernels.flash_attention import tpu_tiles as tiles
from pallas_kernels.flash_attention.tpu_config import TpuConfig, blocks, fuses
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
    NT,
    TN,
    capped,
    dot,
    dscores_of,
    hide,
    key_factor,
    prescaled,
)


def backward(
    query,
    key,
    value,
    lse,
    delta,
    out_gradient,
    intervals,
    *,
    scale: float,
    softcap: float | None,
    dtypes: Sequence[Any],
    config: TpuConfig,
):
    """See `pallas_kernels.flash_attention.tpu.backward`; ``dtypes`` are those of the results."""
    queries, heads = query.shape[1:3]
    keys, kv_heads = key.shape[1:3]
    block_q, block_kv = blocks(config, queries, keys, backward=True)
    intervals = padded_intervals(intervals, block_q, keys)
    # A query that sees nothing has weights 0, whatever is subtracted from its scores.
    lse = jnp.where(jnp.isneginf(lse), 0.0, lse) * LOG2E
    rows = jnp.stack([lse, delta], axis=-1).astype(jnp.float32)
    operands = (
        heads_first(prescaled(query, scale, softcap), block_q),
        heads_first(key, block_kv),
        heads_first(value, block_kv),
        heads_first(out_gradient.astype(value.dtype), block_q),
        jnp.swapaxes(heads_first(rows, block_q), 2, 3),
        starts_and_counts(intervals),
    )
    visits = tiles.visits(intervals, block_q, block_kv, keys)
    run = _fused if fuses(config, query, key) else tpu_split_backward.run
    dq, dk, dv = run(
        operands,
        visits,
        heads // kv_heads,
        block_q,
        block_kv,
        scale=scale,
        softcap=softcap,
        dtypes=dtypes,
        config=config,
    )
    return queries_first(dq, queries), queries_first(dk, keys), queries_first(dv, keys)


def _fused(operands, visits, group, block_q, block_kv, *, scale, softcap, dtypes, config):
    q, k, v, *_, intervals = operands
    batch, kv_heads, keys, width = k.shape
    steps = tiles.steps(*visits)
    specs = Specs(group, block_q, block_kv, width, grouped=True)
    return launch(
        functools.partial(_kernel, scale=scale, softcap=softcap, config=config),
        "flash_attention_backward",
        steps,
        (batch if intervals.shape[0] == 1 else 1, kv_heads, steps.count, group),
        operands,
        [specs.queries(), specs.keys(), specs.keys(), specs.queries(), specs.rows(2), specs.intervals()],
        [(x.shape, dtype) for x, dtype in zip((q, k, v), dtypes, strict=True)],
        [specs.queries_of_group(), specs.all_keys(keys), specs.all_keys(keys)],
        [pltpu.VMEM((group, block_q, width), jnp.float32), *[pltpu.VMEM((keys, width), jnp.float32)] * 2],
    )


def _kernel(
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
    softcap: float | None,
    config: TpuConfig,
):
    step, head = minor_ref[pl.program_id(2)], pl.program_id(3)
    block_q, (block_kv, width) = q_ref.shape[0], k_ref.shape
    keys = dk_sum_ref.shape[0]
    tile = tiles.minor_of(step) * block_kv

    @pl.when((step & tiles.ENTRY_FIRST != 0) & (head == 0))
    def _():
        @pl.loop(0, keys, step=block_kv)
        def _(i):
            dk_sum_ref[pl.ds(i, block_kv)] = jnp.zeros((block_kv, width), jnp.float32)
            dv_sum_ref[pl.ds(i, block_kv)] = jnp.zeros((block_kv, width), jnp.float32)

    @pl.when(step & tiles.FIRST != 0)
    def _():
        dq_sum_ref[head] = jnp.zeros((block_q, width), jnp.float32)

    @when_seen(step)
    def _(masked: bool):
        for row, rows in tiles.chunks(block_kv, config.rows_backward):
            r, sum_r = slice(row, row + rows), pl.ds(tile + row, rows)
            for column, size in tiles.chunks(block_q, config.columns_backward):
                c = slice(column, column + size)
                scores, bounded = capped(dot(k_ref[r], q_ref[c], NT), softcap)
                if masked:
                    scores = hide(scores, 0, interval_ref[0:1, c] - (tile + row), interval_ref[1:2, c])
                weights = jnp.exp2(scores - rows_ref[0:1, c])
                dv_sum_ref[sum_r] += dot(weights.astype(dout_ref.dtype), dout_ref[c], NN)
                dweights = dot(v_ref[r], dout_ref[c], NT)
                dscores = dscores_of(weights, dweights, rows_ref[1:2, c], bounded).astype(q_ref.dtype)
                dk_sum_ref[sum_r] += dot(dscores, q_ref[c], NN)
                dq_sum_ref[head, c] += dot(dscores, k_ref[r], TN)

    @pl.when(step & tiles.LAST != 0)
    def _():
        dq_ref[head] = (dq_sum_ref[head] * scale).astype(dq_ref.dtype)

    @pl.when((step & tiles.ENTRY_LAST != 0) & (head == pl.num_programs(3) - 1))
    def _():
        @pl.loop(0, keys, step=block_kv)
        def _(i):
            part = pl.ds(i, block_kv)
            dk_ref[part] = (dk_sum_ref[part] * key_factor(softcap)).astype(dk_ref.dtype)
            dv_ref[part] = dv_sum_ref[part].astype(dv_ref.dtype)
