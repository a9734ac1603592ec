"""The kernel: tile after tile of query rows meets its pages, block after block, with a running softmax.

A core goes through its tiles in order. While it computes a block, the next one is on its way from device memory, page
by page, the first block of the next tile included; so are the next tile's queries and its row of the block table. The
state of a tile stays in vector memory until its last block; nothing is split, so nothing is left to merge.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_attention import tpu_tiles as tiles
from pallas_kernels.paged_attention.tpu_heads import heads_of, spreads, unpack, words
from pallas_kernels.paged_attention.tpu_lanes import LANES, along, lane_sums, low_lanes

# In base two. A row's peak begins above what a masked score is set to, so that the weight of a masked score is 0 also
# in a row that has seen nothing yet.
NO_PEAK, NO_SCORE = -1e30, -2e30
NT, NN = (((1,), (1,)), ((), ())), (((1,), (0,)), ((), ()))
# Up to so many scores, of several heads, are weighed together: what fits in registers.
_FEW_SCORES = 32 * 1024
# Rows of the block table in scalar memory: this tile's, the next one's, one on its way.
_TABLE_ROWS = 3


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Static sizes of a call; ``group`` is padded, ``rows`` are a tile's, ``chunk`` of them a matrix product's.

    ``most``: largest piece in which rows are moved, a power of two above half of the rows that a tile can have.
    ``compiled``: not interpreted.
    """

    kv_heads: int
    group: int
    head_dim: int
    page_size: int
    table_width: int
    rows: int
    chunk: int
    most: int
    block: int
    compute: int
    interleaved: bool
    quantized: bool
    ordered: bool
    cache_dtype: Any
    query_dtype: Any
    compute_dtype: Any
    softcap: float | None
    compiled: bool

    @property
    def together(self) -> int:
        """Heads whose scores are weighed together, all or one."""
        return self.kv_heads if self.chunk * self.group * self.compute * self.kv_heads <= _FEW_SCORES else 1

    @property
    def pages(self) -> int:
        """Pages of a block."""
        return self.block // self.page_size

    @property
    def staged(self) -> bool:
        """Whether heads are unpacked into a buffer of their own, to be read more than once or one at a time."""
        if self.chunk == self.rows and self.together == self.kv_heads:
            return False
        return self.interleaved or jnp.dtype(self.cache_dtype) != jnp.dtype(self.compute_dtype)


def scratch_shapes(s: Sizes) -> dict[str, Any]:
    """Everything that a core holds, by name."""
    tile = s.rows * s.group
    block = (s.block, s.kv_heads, s.head_dim) if s.interleaved else (s.kv_heads, s.block, s.head_dim)
    shapes = {
        "key": pltpu.VMEM((2, *block), s.cache_dtype),
        "value": pltpu.VMEM((2, *block), s.cache_dtype),
        "query_in": pltpu.VMEM((2, s.kv_heads, s.rows, s.group, s.head_dim), s.query_dtype),
        "position_in": pltpu.VMEM((2, s.rows, s.group, LANES), jnp.int32),
        "total_out": pltpu.VMEM((s.kv_heads, s.rows, s.group, s.head_dim), jnp.float32),
        "stats_out": pltpu.VMEM((s.kv_heads, s.rows, s.group, LANES), jnp.float32),
        "query": pltpu.VMEM((s.kv_heads, tile, s.head_dim), s.compute_dtype),
        "first": pltpu.VMEM((tile, LANES), jnp.int32),
        "count": pltpu.VMEM((tile, LANES), jnp.int32),
        "total": pltpu.VMEM((s.kv_heads, tile, s.head_dim), jnp.float32),
        "weight": pltpu.VMEM((s.kv_heads, tile, LANES), jnp.float32),
        "peak": pltpu.VMEM((s.kv_heads, tile, LANES), jnp.float32),
        "table": pltpu.SMEM((_TABLE_ROWS, 1, s.table_width), jnp.int32),
        "block_arrived": pltpu.SemaphoreType.DMA((2,)),
        "tile_arrived": pltpu.SemaphoreType.DMA((2,)),
        "table_arrived": pltpu.SemaphoreType.DMA((_TABLE_ROWS,)),
        "state_moved": pltpu.SemaphoreType.DMA,
    }
    if s.staged:
        heads = (s.kv_heads, s.block, s.head_dim)
        shapes |= {"key_heads": pltpu.VMEM(heads, s.compute_dtype), "value_heads": pltpu.VMEM(heads, s.compute_dtype)}
    if s.interleaved and spreads(s.kv_heads, s.head_dim, s.cache_dtype):
        shapes |= {"spread": pltpu.VMEM((s.block * s.kv_heads // words(s.cache_dtype), LANES), jnp.int32)}
    if s.quantized:
        scales = (2, s.pages, s.kv_heads, s.page_size)
        shapes |= {"key_scale": pltpu.VMEM(scales, jnp.float32), "value_scale": pltpu.VMEM(scales, jnp.float32)}
        lanes = (s.kv_heads, s.block)
        shapes |= {"key_factor": pltpu.VMEM(lanes, jnp.float32), "value_factor": pltpu.VMEM(lanes, jnp.float32)}
    return shapes


@dataclasses.dataclass(frozen=True)
class _Refs:
    """What lies in device memory, and the scalars; ``ins`` are the results as they were before."""

    bounds: Any
    tiles: Any
    scalars: Any
    table: Any
    position: Any
    query: Any
    key: Any
    value: Any
    key_scale: Any
    value_scale: Any
    total_in: Any
    stats_in: Any
    total: Any
    stats: Any


def kernel(bounds, table_of_tiles, scalars, *refs, sizes: Sizes, aliased: bool, names: tuple[str, ...]):
    """The body of the Pallas call; operands in the order of `_Refs`, those that are not given left out."""
    s = sizes
    given = iter(refs)
    hbm = [next(given) for _ in range(5)]
    scales = [next(given) if s.quantized else None for _ in range(2)]
    ins = [next(given) if aliased else None for _ in range(2)]
    outs = [next(given) for _ in range(2)]
    r = _Refs(bounds, table_of_tiles, scalars, *hbm, *scales, *ins, *outs)
    scratch = dict(zip(names, given, strict=True))
    _Core(s, r, scratch).run()


class _Core:
    """One core's way through its tiles. Methods that begin with ``start`` and ``wait`` move data."""

    def __init__(self, sizes: Sizes, refs: _Refs, scratch: dict[str, Any]):
        self.s, self.r, self.m = sizes, refs, scratch
        core = pl.program_id(0)
        self.first, self.end = refs.bounds[core], refs.bounds[core + 1]
        self.layer, self.window = refs.scalars[0], refs.scalars[1]

    def run(self) -> None:
        first, end = self.first, self.end

        @pl.when(first < end)
        def _():
            self._table_row(first).start()
            self._table_row(first).wait()

            @pl.when(first + 1 < end)
            def _():
                self._table_row(first + 1).start()

            self._rows(first, self._tile_copies, "start")
            self._start_block(first, 0, 0)
            lax.fori_loop(first, end, self._tile, 0)
            self._rows(end - 1, self._out_copies, "wait")

    def _field(self, tile: Any, field: int) -> Any:
        return self.r.tiles[tile * tiles.FIELDS + field]

    def _blocks(self, tile: Any) -> Any:
        return jnp.maximum(_cdiv(self._field(tile, tiles.PAGES), self.s.pages), 1)

    # Data on its way.

    def _table_row(self, tile: Any) -> Any:
        at = lax.rem(tile - self.first, _TABLE_ROWS)
        row = self.r.table.at[self._field(tile, tiles.TABLE_ROW)]
        return pltpu.make_async_copy(row, self.m["table"].at[at], self.m["table_arrived"].at[at])

    def _rows(self, tile: Any, copies: Callable[[Any, Any, int], list[Any]], do: str) -> None:
        """Starts or waits for copies of as many rows as the tile has, in pieces of sizes that are powers of two."""
        count = self._field(tile, tiles.COUNT)
        size = self.s.most
        while size:
            # Rows above this bit of the count are in larger pieces.
            done = count & ~(2 * size - 1)

            @pl.when(count & size != 0)
            def _(done=done, size=size):
                for copy in copies(tile, done, size):
                    getattr(copy, do)()

            size //= 2

    def _tile_copies(self, tile: Any, offset: Any, size: int) -> list[Any]:
        at = lax.rem(tile - self.first, 2)
        source = pl.ds(self._field(tile, tiles.ROW) + offset, size)
        arrived, to = self.m["tile_arrived"].at[at], pl.ds(offset, size)
        return [
            pltpu.make_async_copy(self.r.query.at[:, source], self.m["query_in"].at[at, :, to], arrived),
            pltpu.make_async_copy(self.r.position.at[source], self.m["position_in"].at[at, to], arrived),
        ]

    def _state_copies(self, tile: Any, offset: Any, size: int, back: bool) -> list[Any]:
        there, here = pl.ds(self._field(tile, tiles.OUT) + offset, size), pl.ds(offset, size)
        outside = (self.r.total, self.r.stats) if back else (self.r.total_in, self.r.stats_in)
        copies = []
        for out, name in zip(outside, ("total_out", "stats_out"), strict=True):
            ends = (self.m[name].at[:, here], out.at[:, there])
            copies.append(pltpu.make_async_copy(*(ends if back else ends[::-1]), self.m["state_moved"]))
        return copies

    def _out_copies(self, tile: Any, offset: Any, size: int) -> list[Any]:
        return self._state_copies(tile, offset, size, back=True)

    def _in_copies(self, tile: Any, offset: Any, size: int) -> list[Any]:
        return self._state_copies(tile, offset, size, back=False)

    def _page_copies(self, page: Any, j: Any, slot: Any) -> list[Any]:
        s, m, at = self.s, self.m, (self.layer, page)
        tokens = pl.ds(pl.multiple_of(j * s.page_size, s.page_size), s.page_size)
        to = (slot, tokens) if s.interleaved else (slot, slice(None), tokens)
        copies = [(self.r.key.at[at], m["key"].at[to]), (self.r.value.at[at], m["value"].at[to])]
        if s.quantized:
            copies += [(self.r.key_scale.at[at], m["key_scale"].at[slot, j])]
            copies += [(self.r.value_scale.at[at], m["value_scale"].at[slot, j])]
        return [pltpu.make_async_copy(*ends, m["block_arrived"].at[slot]) for ends in copies]

    def _pages_of(self, tile: Any, block: Any) -> Any:
        return jnp.clip(self._field(tile, tiles.PAGES) - block * self.s.pages, 0, self.s.pages)

    def _start_block(self, tile: Any, block: Any, slot: Any) -> None:
        table_row = lax.rem(tile - self.first, _TABLE_ROWS)
        column = self._field(tile, tiles.FIRST_PAGE) + block * self.s.pages

        def page(j, _):
            for copy in self._page_copies(self.m["table"][table_row, 0, column + j], j, slot):
                copy.start()
            return 0

        self._for_pages(self._pages_of(tile, block), page)

    def _wait_block(self, tile: Any, block: Any, slot: Any) -> None:
        def page(j, _):
            for copy in self._page_copies(0, j, slot):  # which page it was does not matter: all are of one size
                copy.wait()
            return 0

        lax.fori_loop(0, self._pages_of(tile, block), page, 0)

    def _for_pages(self, count: Any, page: Callable[[Any, Any], Any]) -> None:
        """A loop; for a whole block written out, in which the scalar unit works on several pages at a time."""
        if not self.s.compiled:
            lax.fori_loop(0, count, page, 0)
            return

        @pl.when(count == self.s.pages)
        def _():
            for j in range(self.s.pages):
                page(j, 0)

        @pl.when(count < self.s.pages)
        def _():
            lax.fori_loop(0, count, page, 0)

    # A tile.

    def _tile(self, tile: Any, step: Any) -> Any:
        m, end = self.m, self.end

        @pl.when(tile + 1 < end)
        def _():
            self._rows(tile + 1, self._tile_copies, "start")
            self._table_row(tile + 1).wait()

        @pl.when(tile + 2 < end)
        def _():
            self._table_row(tile + 2).start()

        self._rows(tile, self._tile_copies, "wait")
        if self.s.ordered:
            self._out_of_the_way(tile)
            self._rows(tile, self._in_copies, "start")
        self._begin(tile)
        if self.s.ordered:
            self._rows(tile, self._in_copies, "wait")
            self._resume()
        else:
            m["total"][...] = jnp.zeros_like(m["total"])
            m["weight"][...] = jnp.zeros_like(m["weight"])
            m["peak"][...] = jnp.full_like(m["peak"], NO_PEAK)
        blocks = self._blocks(tile)
        lax.fori_loop(0, blocks, functools.partial(self._block, tile, blocks, step), 0)
        if not self.s.ordered:
            self._out_of_the_way(tile)
        self._finish()
        self._rows(tile, self._out_copies, "start")
        return step + blocks

    def _out_of_the_way(self, tile: Any) -> None:
        @pl.when(tile > self.first)
        def _():
            self._rows(tile - 1, self._out_copies, "wait")

    def _begin(self, tile: Any) -> None:
        """Queries in the type that is multiplied, and what each row sees."""
        s, m = self.s, self.m
        at, shape = lax.rem(tile - self.first, 2), (s.rows * s.group, s.head_dim)
        for h in range(s.kv_heads):
            m["query"][h] = m["query_in"].at[at, h].reshape(*shape)[...].astype(s.compute_dtype)
        position = m["position_in"].at[at].reshape(shape[0], LANES)[...]
        first = jnp.maximum(self._field(tile, tiles.BEGIN), position - self.window + 1)
        m["first"][...] = first
        m["count"][...] = jnp.maximum(jnp.minimum(self._field(tile, tiles.END), position + 1) - first, 0)

    def _resume(self) -> None:
        s, m = self.s, self.m
        tile = s.rows * s.group
        low = low_lanes((tile, LANES))
        for h in range(s.kv_heads):
            m["total"][h] = m["total_out"].at[h].reshape(tile, s.head_dim)[...]
            stats = m["stats_out"].at[h].reshape(tile, LANES)[...]
            other = pltpu.roll(stats, LANES // 2, 1)
            m["weight"][h] = jnp.where(low, stats, other)
            m["peak"][h] = jnp.maximum(jnp.where(low, other, stats), NO_PEAK)

    def _finish(self) -> None:
        s, m = self.s, self.m
        tile = s.rows * s.group
        low = low_lanes((tile, LANES))
        for h in range(s.kv_heads):
            weight, peak = m["weight"][h], m["peak"][h]
            if not s.ordered:
                weight = jnp.broadcast_to(weight.sum(axis=1, keepdims=True), weight.shape)
            peak = jnp.where(peak > NO_PEAK, peak, -jnp.inf)
            self._store("stats_out", h, jnp.where(low, weight, peak))
            self._store("total_out", h, m["total"][h])

    def _store(self, name: str, h: int, x: Any) -> None:
        """Rows times group back into rows and group, which for the compiled kernel is a view of the same tiles."""
        to = self.m[name].at[h]
        if self.s.compiled:
            to.reshape(*x.shape)[...] = x
        else:  # the interpreter of JAX 0.10 cannot write through a view
            to[...] = x.reshape(to.shape)

    # A block.

    def _block(self, tile: Any, blocks: Any, step: Any, block: Any, _carry: Any) -> Any:
        s, m = self.s, self.m
        slot = lax.rem(step + block, 2)
        same = block + 1 < blocks

        @pl.when(same | (tile + 1 < self.end))
        def _():
            self._start_block(jnp.where(same, tile, tile + 1), jnp.where(same, block + 1, 0), 1 - slot)

        self._wait_block(tile, block, slot)
        first_page = self._field(tile, tiles.FIRST_PAGE)
        token = (first_page + block * s.pages) * s.page_size
        # What lies beyond was not fetched, or is no token of the segment: it may be NaN.
        fetched = (first_page + self._field(tile, tiles.PAGES)) * s.page_size
        begin, end = self._field(tile, tiles.BEGIN), jnp.minimum(self._field(tile, tiles.END), fetched)
        full_begin, full_end = self._field(tile, tiles.FULL_BEGIN), self._field(tile, tiles.FULL_END)
        if s.staged:
            self._stage(slot)
        if s.quantized:
            for j in range(s.pages):
                lanes = slice(j * s.page_size, (j + 1) * s.page_size)
                m["key_factor"][:, lanes] = m["key_scale"][slot, j]
                m["value_factor"][:, lanes] = m["value_scale"][slot, j]

        def some_tokens(i: Any, _: Any) -> Any:
            column = i * s.compute
            here = token + column
            full = (full_begin <= here) & (here + s.compute <= full_end)

            pl.when(full)(lambda: self._attend(tile, slot, column, None))
            some = jnp.logical_not(full) & (here < end)
            pl.when(some)(lambda: self._attend(tile, slot, column, (here, begin, end)))

            return 0

        if s.block == s.compute:
            return some_tokens(0, 0)
        return lax.fori_loop(0, s.block // s.compute, some_tokens, 0)

    def _stage(self, slot: Any) -> None:
        s, m = self.s, self.m
        for name in ("key", "value"):
            if s.interleaved:
                unpack(m[name].at[slot], m[f"{name}_heads"], m.get("spread"))
            else:
                for h in range(s.kv_heads):
                    m[f"{name}_heads"][h] = m[name][slot, h].astype(jnp.float32).astype(s.compute_dtype)

    def _attend(self, tile: Any, slot: Any, column: Any, mask: Any) -> None:
        s = self.s
        if not s.staged and s.together == s.kv_heads:
            keys, values = self._heads("key", slot, column), self._heads("value", slot, column)
            self._add(range(s.kv_heads), keys, values, column, mask, slice(None))
            return
        tokens = self._tokens(column)

        def some_heads(rows: Any, first: Any) -> Any:
            heads = [first + i for i in range(s.together)]
            at = [(h, tokens) if s.staged else (slot, h, tokens) for h in heads]
            keys, values = ([self.m[f"{x}_heads" if s.staged else x][i] for i in at] for x in ("key", "value"))
            self._add(heads, keys, values, column, mask, rows)
            return 0

        def chunk(c: Any, _: Any) -> Any:
            size = s.chunk * s.group
            rows = slice(None) if s.chunk == s.rows else pl.ds(pl.multiple_of(c * size, size), size)
            if s.together == s.kv_heads:
                return some_heads(rows, 0)
            return lax.fori_loop(0, s.kv_heads, lambda h, _: some_heads(rows, h), 0)

        if s.chunk == s.rows:
            chunk(0, 0)
        else:
            lax.fori_loop(0, _cdiv(self._field(tile, tiles.COUNT), s.chunk), chunk, 0)

    def _tokens(self, column: Any) -> Any:
        """Of a block, from a column on."""
        if self.s.block == self.s.compute:
            return slice(None)
        return pl.ds(pl.multiple_of(column, self.s.compute), self.s.compute)

    def _heads(self, name: str, slot: Any, column: Any) -> list[Any]:
        """Of the block as it came."""
        s, tokens = self.s, self._tokens(column)
        if s.interleaved:
            return heads_of(self.m[name].at[slot, tokens], s.compute_dtype, self.m.get("spread"))
        heads = [self.m[name][slot, h, tokens] for h in range(s.kv_heads)]
        return [x if x.dtype == s.compute_dtype else x.astype(jnp.float32).astype(s.compute_dtype) for x in heads]

    def _add(self, heads: Any, keys: Any, values: Any, column: Any, mask: Any, rows: Any) -> None:
        """Adds some tokens to some rows of some heads, whose scores lie one below the other."""
        s, m = self.s, self.m
        tokens = self._tokens(column)

        def stacked(parts: Any) -> Any:
            parts = list(parts)
            return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=0)

        by_head = [_dot(m["query"][h, rows], key, NT) for h, key in zip(heads, keys, strict=True)]
        size = by_head[0].shape[0]
        if s.quantized:
            by_head = [x * m["key_factor"][pl.ds(h, 1), tokens] for h, x in zip(heads, by_head, strict=True)]
        scores = stacked(by_head)
        if s.softcap is not None:
            scores = jnp.tanh(scores) * jnp.float32(s.softcap * LOG2E)
        seen = None
        if mask is not None:
            here, begin, end = mask
            first, count = (jnp.tile(m[x][rows], (len(heads), s.compute // LANES)) for x in ("first", "count"))
            token = lax.broadcasted_iota(jnp.int32, scores.shape, 1) + here
            # One comparison in place of two: a token before the first is a huge unsigned number.
            seen = (token - first).astype(jnp.uint32) < count.astype(jnp.uint32)
            scores = jnp.where(seen, scores, NO_SCORE)
            token = lax.broadcasted_iota(jnp.int32, values[0].shape, 0) + here
            held = (token >= begin) & (token < end)
            values = [jnp.where(held, x, jnp.zeros_like(x)) for x in values]
        peak = stacked(m["peak"][h, rows] for h in heads)
        higher = jnp.maximum(peak, scores.max(axis=1, keepdims=True))
        weights = jnp.exp2(scores - along(higher, s.compute))
        decay = jnp.exp2(peak - higher)
        added = lane_sums(weights)
        if s.ordered:  # what is kept must not depend on where the tokens are cut
            added = jnp.broadcast_to(added.sum(axis=1, keepdims=True), added.shape)
        for i, (h, value) in enumerate(zip(heads, values, strict=True)):
            part = slice(i * size, (i + 1) * size)
            m["peak"][h, rows] = higher[part]
            m["weight"][h, rows] = m["weight"][h, rows] * decay[part] + added[part]
            weight = weights[part]
            if s.quantized:
                weight = weight * m["value_factor"][pl.ds(h, 1), tokens]
                weight = weight if seen is None else jnp.where(seen[part], weight, 0.0)
            new = _dot(weight.astype(s.compute_dtype), value, NN)
            m["total"][h, rows] = m["total"][h, rows] * along(decay[part], s.head_dim) + new


LOG2E = 1.4426950408889634


def _dot(x, y, dimensions):
    """Products of float32 operands keep their precision; the unit's own is bfloat16."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _cdiv(x: Any, y: int) -> Any:
    return lax.div(x + (y - 1), jnp.int32(y))
