"""Gradients on TPUs from two kernels, for keys too many to keep the sums of their gradients in VMEM.

One sums over keys for each tile of queries. The other sums over queries, and over the heads that share a key, for each
tile of keys; it holds scores as ``[keys, queries]``, so that no operand of its four products has to be transposed.
"""

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash_attention import tpu_tiles as tiles
from pallas_kernels.flash_attention.tpu_config import LANES, TpuConfig
from pallas_kernels.flash_attention.tpu_launch import Specs, launch, when_seen
from pallas_kernels.flash_attention.tpu_scores import (
    NN,
    NT,
    along,
    capped,
    columns,
    dot,
    dscores_of,
    hide,
    key_factor,
)


def run(operands, visits, group, block_q, block_kv, *, scale, softcap, dtypes, config):
    """Gradients ``[batch, heads, padded rows, head_dim]`` of query, key and value.

    Args:
      operands: query, key, value, gradient of the output, ``[batch, heads, 2, queries]`` of log-sum-exp (in base two)
        and delta, and starts and counts of the intervals; whole tiles.
      visits: what `tiles.visits` says of the intervals.
    """
    q, k, v, *_, intervals = operands
    batch, heads, _, width = q.shape
    entries = batch if intervals.shape[0] == 1 else 1
    specs = Specs(group, block_q, block_kv, width)
    steps = tiles.steps(*visits)
    (dq,) = launch(
        functools.partial(_query_kernel, scale=scale, softcap=softcap, config=config),
        "flash_attention_dq",
        steps,
        (entries, heads, steps.count),
        operands,
        [specs.queries(), specs.keys(), specs.keys(), specs.queries(), specs.rows(2), specs.intervals()],
        [(q.shape, dtypes[0])],
        [specs.queries()],
        [
            pltpu.VMEM((block_q, width), jnp.float32),
            *[pltpu.VMEM((block_q, LANES), jnp.float32)] * 2,
            *[pltpu.VMEM((block_q, LANES), jnp.int32)] * 2,
        ],
    )
    specs = Specs(group, block_q, block_kv, width, queries_major=False, grouped=True)
    steps = tiles.steps(*(jnp.swapaxes(x, 1, 2) for x in visits))
    dk, dv = launch(
        functools.partial(_key_kernel, softcap=softcap, config=config),
        "flash_attention_dkv",
        steps,
        (entries, heads // group, steps.count, group),
        operands,
        [specs.queries(), specs.keys(), specs.keys(), specs.queries(), specs.rows(2), specs.intervals()],
        [(k.shape, dtypes[1]), (v.shape, dtypes[2])],
        [specs.keys(), specs.keys()],
        [pltpu.VMEM((block_kv, width), jnp.float32)] * 2,
    )
    return dq, dk, dv


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

    @when_seen(step)
    def _(masked: bool):
        for row, rows in tiles.chunks(block_q, config.rows_backward):
            r = slice(row, row + rows)
            for column, size in tiles.chunks(block_kv, config.columns_backward):
                c = slice(column, column + size)
                scores, bounded = capped(dot(q_ref[r], k_ref[c], NT), softcap)
                if masked:
                    first = tiles.minor_of(step) * block_kv + column
                    scores = hide(scores, 1, along(start_ref[r] - first, size), along(count_ref[r], size))
                weights = jnp.exp2(scores - along(lse_ref[r], size))
                dweights = dot(dout_ref[r], v_ref[c], NT)
                dscores = dscores_of(weights, dweights, along(delta_ref[r], size), bounded)
                sum_ref[r] += dot(dscores.astype(k_ref.dtype), k_ref[c], NN)

    @pl.when(step & tiles.LAST != 0)
    def _():
        dq_ref[...] = (sum_ref[...] * scale).astype(dq_ref.dtype)


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

    @when_seen(step)
    def _(masked: bool):
        for row, rows in tiles.chunks(block_kv, config.rows_backward):
            r = slice(row, row + rows)
            for column, size in tiles.chunks(block_q, config.columns_backward):
                c = slice(column, column + size)
                scores, bounded = capped(dot(k_ref[r], q_ref[c], NT), softcap)
                if masked:
                    first = tiles.major_of(major_ref[index]) * block_kv + row
                    scores = hide(scores, 0, interval_ref[0:1, c] - first, interval_ref[1:2, c])
                weights = jnp.exp2(scores - rows_ref[0:1, c])
                dv_sum_ref[r] += dot(weights.astype(dout_ref.dtype), dout_ref[c], NN)
                dweights = dot(v_ref[r], dout_ref[c], NT)
                dscores = dscores_of(weights, dweights, rows_ref[1:2, c], bounded)
                dk_sum_ref[r] += dot(dscores.astype(q_ref.dtype), q_ref[c], NN)

    @pl.when((step & tiles.LAST != 0) & (head == pl.num_programs(3) - 1))
    def _():
        dk_ref[...] = (dk_sum_ref[...] * key_factor(softcap)).astype(dk_ref.dtype)
        dv_ref[...] = dv_sum_ref[...].astype(dv_ref.dtype)
