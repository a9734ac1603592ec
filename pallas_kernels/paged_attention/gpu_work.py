"""Which blocks of keys each worker of the GPU kernel adds up, computed on the device from lengths that are traced.

A *tile* is some rows of one segment; a *unit* is a tile of one kv head, numbered ``tile * kv_heads + head``. All units'
blocks lie in one row, unit after unit, and every worker takes an equal run of it (stream-K): whatever the lengths, all
workers get as much, the last ones with work excepted. A unit counts for one block more than it has, for its queries and
results. A worker's part of a unit is a *piece*. Piece ``(unit, worker)`` is stored at place ``unit + worker``: along
the row at least one of the two grows from piece to piece, so that no two share a place, and a unit's pieces lie side by
side.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.paged_attention.segments import Segments

OVERHEAD = 1  # blocks that the start and the end of a unit are worth


class Column:
    """Columns of `Work.tiles`."""

    TABLE_ROW, BEGIN, END, FULL_BEGIN, FULL_END, BLOCK, BLOCKS, START, COST = range(9)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("tiles", "query", "out", "spans", "limits", "place", "pieces", "merged", "jobs", "tile_of_segment"),
    meta_fields=("rows",),
)
@dataclasses.dataclass(frozen=True)
class Work:
    """What the kernels need to know.

    Attributes:
      tiles: see `Column`; in tokens and blocks.
      query, out: the tiles' first rows.
      spans: of each worker, its first unit and one past its last.
      limits: blocks per worker; the window.
      place: of each unit, the place of its first piece that has blocks.
      pieces: of each unit, how many pieces have blocks.
      merged: of each unit of more than one piece, the job that merges it.
      jobs: first place and number of pieces to merge; 0 pieces: nothing to do.
      tile_of_segment: the first tile of each segment, -1 for one that is not in this list.
      rows: of a tile at most.
    """

    tiles: Int[Array, "tiles columns"]
    query: Int[Array, " tiles"]
    out: Int[Array, " tiles"]
    spans: Int[Array, "workers 2"]
    limits: Int[Array, " 2"]
    place: Int[Array, " units"]
    pieces: Int[Array, " units"]
    merged: Int[Array, " units"]
    jobs: Int[Array, "jobs 2"]
    tile_of_segment: Int[Array, " segments"]
    rows: int


class Cut(NamedTuple):
    """Sizes that are known when the program is built."""

    rows: int  # of a tile at most
    tiles: int  # at most
    kv_heads: int
    block: int
    workers: int
    least: int
    whole: bool  # units are not split
    always: bool  # every unit has a merge job of its own
    single: bool  # segments of one tile each


def work_list(
    segments: Segments,
    chosen: Int[Array, " segments"],
    position: Int[Array, " rows"],
    window: int | Int[Array, ""] | None,
    cut: Cut,
) -> Work:
    """The work of the ``chosen`` segments (a mask)."""
    tiles, query, out, tile_of_segment = _tiles(segments, chosen, position, window, cut)
    cost = tiles[:, Column.COST]
    start = tiles[:, Column.START]
    total = start[-1] + cost[-1] * cut.kv_heads
    per = jnp.maximum(-(-total // cut.workers), cut.least)

    def unit_at(x):
        """The unit that holds element ``x`` of the row."""
        tile = jnp.searchsorted(start, x, side="right", method="compare_all").astype(jnp.int32) - 1
        return tile * cut.kv_heads + (x - start[tile]) // jnp.maximum(cost[tile], 1)

    head = jnp.arange(cut.kv_heads, dtype=jnp.int32)
    unit_start = (start[:, None] + head * cost[:, None]).reshape(-1)
    unit_cost = jnp.repeat(cost, cut.kv_heads)
    unit_blocks = jnp.repeat(tiles[:, Column.BLOCKS], cut.kv_heads)
    unit = jnp.arange(unit_start.size, dtype=jnp.int32)
    edge = jnp.arange(cut.workers, dtype=jnp.int32) * per
    if cut.whole:  # a unit belongs to the worker in whose run it starts
        used = unit_cost > 0
        first = jnp.sum((unit_start < edge[:, None]) & used, axis=1, dtype=jnp.int32)
        last = jnp.sum((unit_start < edge[:, None] + per) & used, axis=1, dtype=jnp.int32)
        spans = jnp.stack([first, last], axis=1)
        pieces = (unit_blocks > 0).astype(jnp.int32)
        place, merged, jobs = unit, jnp.zeros_like(unit), jnp.zeros((1, 2), jnp.int32)
    else:
        busy = edge < total
        spans = jnp.stack([unit_at(edge), unit_at(jnp.minimum(edge + per, total) - 1) + 1], axis=1)
        spans = jnp.where(busy[:, None], spans, 0)
        first, last = unit_start // per, (unit_start + unit_cost - 1) // per
        # A first piece may hold nothing but the overhead.
        idle = jnp.minimum((first + 1) * per - unit_start, unit_cost) <= OVERHEAD
        pieces = jnp.where(unit_blocks > 0, last - first + 1 - idle, 0)
        place = unit + first + idle
        if cut.always:
            merged, jobs = unit, jnp.stack([place, pieces], axis=1)
        else:
            # Only a unit that an edge cuts has several pieces: the first edge within it does the job.
            merged = jnp.clip(first + 1, 0, cut.workers - 1)
            cutting = jnp.where(busy, unit_at(edge), 0)
            mine = busy & (first[cutting] + 1 == jnp.arange(cut.workers)) & (pieces[cutting] > 1)
            jobs = jnp.stack([place[cutting], jnp.where(mine, pieces[cutting], 0)], axis=1)
    limits = jnp.stack([per, jnp.asarray(0 if window is None else window, jnp.int32)])
    return Work(tiles, query, out, spans, limits, place, pieces, merged, jobs, tile_of_segment, cut.rows)


def _tiles(segments, chosen, position, window, cut):
    """The tiles, and the first of each segment."""
    count = jnp.where(chosen, segments.query_count, 0)
    numbers = jnp.arange(cut.tiles, dtype=jnp.int32)
    if cut.single:
        segment, nth, used = numbers, jnp.zeros_like(numbers), jnp.ones(cut.tiles, bool)
        tile_of_segment = numbers
    else:
        each = -(-count // cut.rows)
        tile_of_segment = jnp.cumsum(each) - each
        segment = jnp.searchsorted(tile_of_segment, numbers, side="right", method="compare_all").astype(jnp.int32) - 1
        nth, used = numbers - tile_of_segment[segment], numbers < jnp.sum(each)
    first = nth * cut.rows
    rows = jnp.where(used, jnp.clip(count[segment] - first, 0, cut.rows), 0)
    query = segments.query_begin[segment] + first
    lane = jnp.arange(cut.rows, dtype=jnp.int32)
    at = position[jnp.clip(query[:, None] + lane, 0, position.size - 1)]
    mine = lane < rows[:, None]
    highest = jnp.max(jnp.where(mine, at, -1), axis=1)
    lowest = jnp.min(jnp.where(mine, at, jnp.iinfo(jnp.int32).max - 1), axis=1)
    seeing = jnp.min(jnp.where(mine & (at >= 0), at, jnp.iinfo(jnp.int32).max - 1), axis=1)
    begin, end = segments.kv_begin[segment], segments.kv_end[segment]
    low, full_begin = begin, begin
    if window is not None:
        low, full_begin = jnp.maximum(low, seeing - window + 1), jnp.maximum(begin, highest - window + 1)
    high = jnp.minimum(end, highest + 1)
    block = low // cut.block
    blocks = jnp.where(high > low, -(-high // cut.block) - block, 0)
    cost = jnp.where(used, blocks + OVERHEAD, 0)
    start = (jnp.cumsum(cost) - cost) * cut.kv_heads
    row, full_end = segments.table_row[segment], jnp.minimum(end, lowest + 1)
    tiles = jnp.stack([row, begin, end, full_begin, full_end, block, blocks, start, cost], axis=1)  # as in `Column`
    out = segments.out_begin[segment] + first
    return tiles, query, out, jnp.where(count > 0, tile_of_segment, -1)
