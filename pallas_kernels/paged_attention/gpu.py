"""The core for Hopper GPUs, in Pallas Mosaic GPU: see `gpu_work` for who does what, and `gpu_kernel` for how."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.chips import chip_of
from pallas_kernels.paged_attention.gpu_config import ROWS, GpuConfig, heuristic, why_not
from pallas_kernels.paged_attention.gpu_kernel import attention
from pallas_kernels.paged_attention.gpu_merge import merge
from pallas_kernels.paged_attention.gpu_plan import Plan
from pallas_kernels.paged_attention.gpu_work import Cut, Work, work_list
from pallas_kernels.paged_attention.segments import Carry
from pallas_kernels.platform import chip, platform
from pallas_kernels.tuning import tuned_config

__all__ = ["GpuConfig", "attend", "finish", "heuristic", "why_not"]

_LN2 = math.log(2.0)
_FEW = 16  # rows, times heads of a group, of a segment of few rows


def attend(
    query,
    position,
    cache,
    layer,
    block_table,
    segments,
    *,
    outputs,
    decode,
    window,
    scale,
    softcap,
    carry=None,
    ordered=False,
    config=None,
):
    """See `pallas_kernels.paged_attention.segments`. A carry's ``peak`` is a logarithm to the base of 2."""
    heads, head_dim = query.shape[1:]
    layers, pages, page_size, kv_heads, _ = cache.key.shape
    group = heads // kv_heads
    config = _config(query, cache, block_table) if config is None else config
    config.check(cache, ordered=ordered)
    interpret = _interpret()
    common = {
        # Merging the outer axes is a change of shape alone, and TMA has five axes at most.
        "key": cache.key.reshape(layers * pages, page_size, kv_heads, head_dim),
        "value": cache.value.reshape(layers * pages, page_size, kv_heads, head_dim),
        "layer_pages": (jnp.asarray(layer, jnp.int32) * pages).reshape(1),
        "table": block_table,
    }
    # TMA writes shared memory in runs of 128 bytes: 32 scales. Those of smaller pages are laid side by side first.
    gathered = cache.quantized and page_size < 32
    if gathered:
        longest = max(config.block, config.wide_block)
        lay = functools.partial(_scales, layer=layer, block_table=block_table, multiple=longest)
        common |= {"key_scale": lay(cache.key_scale), "value_scale": lay(cache.value_scale)}
    elif cache.quantized:
        flat = (layers * pages, kv_heads, page_size)
        common |= {"key_scale": cache.key_scale.reshape(flat), "value_scale": cache.value_scale.reshape(flat)}

    def launch(split: bool, chosen: Any, tiles: int, tile_rows: int, rows: int) -> tuple[Work, dict[str, Any]]:
        block, stages, warpgroups = config.shape(wide=not split)
        cut = Cut(
            rows=tile_rows,
            tiles=tiles,
            kv_heads=kv_heads,
            block=block,
            workers=config.workers,
            least=config.least,
            whole=ordered,
            always=split and warpgroups > 1,
            single=split,
        )
        work = work_list(segments, chosen, position, window, cut)
        plan = Plan(
            split=split,
            ordered=ordered,
            block=block,
            stages=stages,
            warpgroups=warpgroups,
            workers=config.workers,
            kv_heads=kv_heads,
            head_dim=head_dim,
            page_size=page_size,
            dtype=query.dtype,
            kept=cache.key.dtype,
            scale=scale,
            softcap=softcap,
            windowed=window is not None,
            rows=rows,
            gathered_scales=gathered,
            in_place=head_dim > 128 and interpret is None,
        )
        sheets = 1 if split else warpgroups
        laid = functools.partial(_laid, rows=tile_rows, kv_heads=kv_heads, sheets=sheets)
        at = jnp.repeat(position.astype(jnp.int32)[:, None], group, axis=1)
        operands = {
            **common,
            "query": laid(query, work.query, lanes=rows),
            "position": laid(at, work.query, lanes=ROWS, kv_heads=1),
            "tiles": work.tiles,
            "spans": work.spans,
            "limits": work.limits,
        }
        if ordered:
            operands |= {
                "carry_total": laid(carry.total, work.out, lanes=ROWS),
                "carry_weight": laid(carry.weight, work.out, lanes=ROWS),
                "carry_peak": laid(carry.peak, work.out, lanes=ROWS),
            }
        result = attention(plan, work, operands, interpret=interpret)
        if not ordered:
            result["merged"], result["merged_lse"] = merge(
                result["out"], result["lse"], work.jobs, split=split, interpret=interpret
            )
        return work, result

    count = segments.query_count
    wide_rows = ROWS * config.wide_warpgroups // group

    # Rows of the output are of one segment at most, which bounds the number of full tiles.
    def wide_tiles(segments_of_many):
        return outputs // wide_rows + segments_of_many

    place = _Place.of(segments, outputs)
    if ordered:
        carry = Carry.nothing(outputs, heads, head_dim) if carry is None else carry
        work, result = launch(False, count > 0, wide_tiles(count.size), wide_rows, ROWS)
        return _ordered_result(work, result, place, carry, kv_heads)
    if decode:
        return _result([launch(True, count > 0, count.size, 1, -(-group // 8) * 8)], place, kv_heads, group)
    # Decodes among prefills (and the few rows of a speculation): more rows would store more than they save.
    few = max(1, _FEW // group)
    many = min(count.size, outputs // (few + 1))
    parts = [launch(True, (count > 0) & (count <= few), count.size, few, -(-few * group // 8) * 8)]
    if many:
        parts.append(launch(False, count > few, wide_tiles(many), wide_rows, ROWS))
    return _result(parts, place, kv_heads, group)


def finish(carry):
    """The output and its log-sum-exp of a `Carry` that `attend` made."""
    seen = carry.weight > 0
    safe = jnp.where(seen, carry.weight, 1.0)
    return carry.total / safe[..., None], jnp.where(seen, carry.peak * _LN2 + jnp.log(safe), -jnp.inf)


def _config(query, cache, block_table) -> GpuConfig:
    page_size, kv_heads, head_dim = cache.key.shape[2:]
    shape = {
        "head_dim": head_dim,
        "page_size": page_size,
        "heads": query.shape[1],
        "kv_heads": kv_heads,
        "cache": cache.key.dtype.name,
        "rows": query.shape[0],
        "tokens": block_table.shape[1] * page_size,
    }
    best = tuned_config(GpuConfig, "paged_attention", chip(), query.dtype, **shape)
    known = chip_of(chip())
    return best or heuristic(head_dim, page_size, cache.quantized, workers=known.cores if known else 132)


def _interpret() -> Any:
    if platform() == "gpu":
        return None
    if not hasattr(plgpu, "InterpretGPUParams"):
        raise NotImplementedError(f"implementation='gpu' on {platform()} needs the interpreter of JAX 0.11 or newer")
    return plgpu.InterpretGPUParams()


def _laid(x, first, *, rows, kv_heads, sheets, lanes):
    """``x [rows, heads, ...]`` as ``[units, sheets, lanes, ...]``: each tile's rows, from its ``first``, in one run."""
    x = x[jnp.clip(first[:, None] + jnp.arange(rows), 0, x.shape[0] - 1)]
    tiles, rest = x.shape[0], x.shape[3:]
    x = jnp.moveaxis(x.reshape(tiles, rows, kv_heads, -1, *rest), 2, 1).reshape(tiles * kv_heads, -1, *rest)
    x = jnp.pad(x, ((0, 0), (0, sheets * lanes - x.shape[1]), *[(0, 0)] * len(rest)))
    return x.reshape(tiles * kv_heads, sheets, lanes, *rest)


def _scales(scales, *, layer, block_table, multiple):
    """One layer's scales ``[sequences, kv_heads, tokens]``, in the order of the sequences' tokens."""
    x = scales[layer, jnp.clip(block_table, 0, scales.shape[1] - 1)]
    x = jnp.moveaxis(x, 2, 1).reshape(x.shape[0], x.shape[2], -1)
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % multiple)))


@dataclasses.dataclass(frozen=True)
class _Place:
    """Of each row of the output: the segment that writes it, and the row in the segment."""

    segment: jax.Array
    row: jax.Array
    written: jax.Array

    @classmethod
    def of(cls, segments, outputs):
        out = jnp.arange(outputs, dtype=jnp.int32)[:, None]
        mine = (out >= segments.out_begin) & (out < segments.out_begin + segments.query_count)
        segment = jnp.argmax(mine, axis=1).astype(jnp.int32)
        return cls(segment, out[:, 0] - segments.out_begin[segment], mine.any(axis=1))

    def lanes(self, work, kv_heads, group):
        """``[outputs, heads]``: whether ``work`` has the row, and the unit and its row there."""
        first = work.tile_of_segment[self.segment]
        row = jnp.where(self.written, self.row, 0)
        tile = jnp.maximum(first, 0) + row // work.rows
        head = jnp.arange(kv_heads * group, dtype=jnp.int32)
        unit = jnp.minimum(tile, work.tiles.shape[0] - 1)[:, None] * kv_heads + head // group
        return (first >= 0)[:, None] & self.written[:, None], unit, (row % work.rows)[:, None] * group + head % group


def _result(parts, place, kv_heads, group):
    out = lse = None
    for work, result in parts:
        mine, unit, lane = place.lanes(work, kv_heads, group)
        sheets, rows = result["merged"].shape[1:3]
        several = (work.pieces > 1)[unit]
        sheet, lane = jnp.minimum(lane // ROWS, sheets - 1), lane % ROWS
        at = (work.merged[unit], sheet, jnp.minimum(lane, rows - 1))
        its_out, its_lse = result["merged"][at], result["merged_lse"][at]
        if sheets > 1 or result["out"].shape[1] == 1:  # a piece of its own is the result
            at = (work.place[unit], sheet, lane)
            its_out = jnp.where(several[..., None], its_out, result["out"][at])
            its_lse = jnp.where(several, its_lse, result["lse"][at])
        nothing = (work.pieces == 0)[unit]
        its_out = jnp.where(nothing[..., None], 0.0, its_out)
        its_lse = jnp.where(nothing, -jnp.inf, its_lse * _LN2)
        out = its_out if out is None else jnp.where(mine[..., None], its_out, out)
        lse = its_lse if lse is None else jnp.where(mine, its_lse, lse)
    return out, lse


def _ordered_result(work, result, place, carry, kv_heads):
    mine, unit, lane = place.lanes(work, kv_heads, carry.total.shape[1] // kv_heads)
    mine &= (work.pieces > 0)[unit]
    at = (work.place[unit], lane // ROWS, lane % ROWS)

    def pick(name, old):
        return jnp.where(mine, result[name][at], old)

    total = jnp.where(mine[..., None], result["out"][at], carry.total)
    return Carry(total, pick("lse", carry.weight), pick("peak", carry.peak))
