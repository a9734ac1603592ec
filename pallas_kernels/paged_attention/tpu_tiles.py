"""The work of a call, cut into tiles: runs of query rows of one segment, with the pages that any of them sees."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.paged_attention.segments import Segments, ordered_block

# What a tile's entry in the table says, each an int32.
FIELDS = 10
ROW, OUT, COUNT, TABLE_ROW, FIRST_PAGE, PAGES, BEGIN, END, FULL_BEGIN, FULL_END = range(FIELDS)

# Stands for no sliding window: more tokens than any sequence has.
NO_WINDOW = 2**30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tiles in the order of their segments.

    Attributes:
      table: flat, `FIELDS` numbers for each tile, used tiles first. Scalar memory pads rows of a matrix.
      bounds: core ``c`` works on tiles ``bounds[c] .. bounds[c + 1] - 1``.
    """

    table: Int[Array, " tiles*fields"]
    bounds: Int[Array, " cores+1"]


def make_tiles(
    segments: Segments,
    counts: Int[Array, " segments"],
    position: Int[Array, " rows"],
    window: int | Int[Array, ""] | None,
    *,
    rows: int,
    capacity: int,
    page_size: int,
    block: int,
    ordered: bool,
    cores: int,
) -> Tiles:
    """Cuts segments into tiles.

    Args:
      segments: the work.
      counts: rows of each segment that are to be in this table; 0: none of it.
      position: of each row in its sequence.
      window: sliding window.
      rows: most rows of a tile.
      capacity: tiles that the table can hold.
      page_size: tokens in a page.
      block: tokens that are fetched at a time, of which each core's share is counted.
      ordered: tokens are counted from a multiple of the ordered block.
      cores: that share the tiles, each about as many blocks.
    """
    per_segment = (counts + rows - 1) // rows
    until = jnp.cumsum(per_segment)
    tile = jnp.arange(capacity, dtype=jnp.int32)
    used = tile < until[-1]
    segment = jnp.searchsorted(until, tile, side="right", method="compare_all").astype(jnp.int32)
    segment = jnp.minimum(segment, until.shape[0] - 1)
    offset = (tile - (until[segment] - per_segment[segment])) * rows
    count = jnp.where(used, jnp.minimum(counts[segment] - offset, rows), 0)
    row = segments.query_begin[segment] + offset
    begin, end = segments.kv_begin[segment], segments.kv_end[segment]
    lane = jnp.arange(rows, dtype=jnp.int32)
    mine = lane < count[:, None]
    p = position[jnp.where(mine, row[:, None] + lane, 0)]
    first = jnp.maximum(begin[:, None], p - (NO_WINDOW if window is None else window) + 1)
    last = jnp.minimum(end[:, None], p + 1)
    sees = mine & (first < last)
    lowest = jnp.min(jnp.where(sees, first, jnp.iinfo(jnp.int32).max), axis=1)
    highest = jnp.max(jnp.where(sees, last, 0), axis=1)
    any_sees = highest > 0
    unit = (ordered_block(page_size) if ordered else page_size) // page_size
    first_page = jnp.where(any_sees, lowest, 0) // page_size // unit * unit
    pages = jnp.where(any_sees, (highest + page_size - 1) // page_size - first_page, 0)
    full_begin = jnp.max(jnp.where(mine, first, 0), axis=1)
    full_end = jnp.min(jnp.where(mine, jnp.where(first < last, last, 0), jnp.iinfo(jnp.int32).max), axis=1)
    out, table_row = segments.out_begin[segment] + offset, segments.table_row[segment]
    fields = (row, out, count, table_row, first_page, pages, begin, end, full_begin, full_end)
    table = jnp.stack([x.astype(jnp.int32) for x in fields], axis=1).reshape(-1)
    return Tiles(table, _bounds(jnp.where(used, blocks_of(pages * page_size, block), 0), until[-1], cores))


def blocks_of(tokens: Any, block: int) -> Any:
    """Blocks that a tile goes through: at least one, in which nothing may be visible."""
    return jnp.maximum((tokens + block - 1) // block, 1)


def _bounds(blocks: Int[Array, " tiles"], tiles: Int[Array, ""], cores: int) -> Int[Array, " cores+1"]:
    until = jnp.cumsum(blocks)
    shares = until[-1] * jnp.arange(cores + 1) // cores
    # A tile is the core's in whose share its middle falls.
    bounds = jnp.searchsorted(until - blocks // 2, shares, side="left", method="compare_all")
    return jnp.minimum(bounds, tiles).at[0].set(0).at[-1].set(tiles).astype(jnp.int32)
