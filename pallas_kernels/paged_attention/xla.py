"""The core in plain XLA operations: the path for CPUs, and for any platform without a kernel of its own.

Two ways, by how many rows a segment has. *Few rows*: the tokens of every row are cut into equal chunks, and one loop
works through the list of all rows' chunks, several at a time, so that a long row among short ones makes no one wait;
each chunk leaves a partial result with its log-sum-exp, and a second, short loop merges them. *Many rows*: a tile of
rows meets chunk after chunk as a matrix product, with a running softmax.

What XLA's CPU compiler does well decided the form: for few rows a multiply-reduce is vectorized and uses all cores,
where a batched `dot_general` does neither; a gather is fast only into a buffer that stays in the cache, hence chunks.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.paged_attention.reference import finish
from pallas_kernels.paged_attention.segments import Carry, ordered_block

__all__ = ["XlaConfig", "attend", "finish", "why_not"]


@dataclasses.dataclass(frozen=True)
class XlaConfig:
    """Sizes of the loops.

    Attributes:
      chunk: tokens in a chunk.
      gather_bytes: keys that the few-rows loop has in hand at a time, in bytes: what a core's cache holds.
      tile: rows of a tile, which times the query heads of a group are the rows of a matrix product.
      few: segments of at most so many rows go row by row.
    """

    chunk: int = 256
    gather_bytes: int = 2**20
    tile: int = 32
    few: int = 2

    def __post_init__(self):
        for name in ("chunk", "gather_bytes", "tile"):
            if getattr(self, name) < 1:
                raise ValueError(f"XlaConfig.{name}={getattr(self, name)}: must be at least 1")


def why_not(query, cache, *, decode) -> str | None:
    """Nothing is refused."""
    del query, cache, decode
    return None


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
    """See `pallas_kernels.paged_attention.segments`."""
    config = XlaConfig() if config is None else config
    work = _Work(query, position, cache, layer, block_table, window, scale, softcap)
    rows = _row_tiles(segments, outputs)
    if ordered:
        return _in_order(work, rows, carry)
    few = rows.count * (rows.size <= config.few)
    out, lse = _few_rows(work, dataclasses.replace(rows, count=few), config)
    if decode:
        return out, lse
    many = _many_rows(work, segments, outputs, config)
    alone = few > 0
    return jnp.where(alone[:, None, None], out, many[0]), jnp.where(alone[:, None], lse, many[1])


@dataclasses.dataclass(frozen=True)
class _Work:
    """What all rows have in common."""

    query: Any
    position: Any
    cache: Any
    layer: Any
    block_table: Any
    window: Any
    scale: float
    softcap: float | None

    @property
    def group(self) -> int:
        return self.query.shape[1] // self.cache.key.shape[3]

    def first_visible(self, lowest: Any) -> Any:
        """First token that a row at this position may see."""
        return 0 if self.window is None else lowest - self.window + 1

    def pages(self, table_row: Any, first: Any, count: int) -> Any:
        """Page numbers ``[..., count]`` from page ``first`` of a sequence on; where there are none, some page."""
        column = first[..., None] + jnp.arange(count)
        column = jnp.clip(column, 0, self.block_table.shape[1] - 1)
        pages = self.block_table[table_row[..., None], column]
        return jnp.clip(pages, 0, self.cache.key.shape[1] - 1)

    def take(self, pages: Any) -> tuple[Any, Any]:
        """Keys and values ``[..., count, page_size, kv_heads, head_dim]`` of pages, float32."""

        def gather(x: Any, scales: Any) -> Any:
            x = x.at[self.layer, pages].get(mode="promise_in_bounds").astype(jnp.float32)
            if scales is None:
                return x
            scales = scales.at[self.layer, pages].get(mode="promise_in_bounds")
            return x * jnp.swapaxes(scales, -1, -2)[..., None]

        return gather(self.cache.key, self.cache.key_scale), gather(self.cache.value, self.cache.value_scale)

    def capped(self, logits: Any) -> Any:
        logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)

    def visible(self, token: Any, position: Any, begin: Any, end: Any) -> Any:
        visible = (token >= begin) & (token < end) & (token <= position)
        return visible if self.window is None else visible & (token > position - self.window)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Tiles:
    """Rows, or runs of rows, of segments: for each the first row of the query and of the output, and what it reads."""

    query: Any
    out: Any
    count: Any
    table_row: Any
    begin: Any
    end: Any
    size: Any  # rows of the whole segment


def _row_tiles(segments: Any, outputs: int) -> _Tiles:
    """One tile per row of the output; a row that no segment writes has count 0."""
    used = segments.query_count > 0
    where = jnp.where(used, segments.out_begin, outputs)
    index = jnp.arange(where.shape[0], dtype=jnp.int32)
    begin = jnp.full(outputs, -1, jnp.int32).at[where].set(where.astype(jnp.int32), mode="drop")
    segment = jnp.zeros(outputs, jnp.int32).at[where].set(index, mode="drop")
    begin = lax.cummax(begin)  # rows of a segment follow its first
    segment = segment[jnp.maximum(begin, 0)]
    offset = jnp.arange(outputs, dtype=jnp.int32) - begin
    count = (begin >= 0) & (offset < segments.query_count[segment])
    return _Tiles(
        query=jnp.where(count, segments.query_begin[segment] + offset, 0),
        out=jnp.arange(outputs, dtype=jnp.int32),
        count=count.astype(jnp.int32),
        table_row=segments.table_row[segment],
        begin=segments.kv_begin[segment],
        end=segments.kv_end[segment],
        size=segments.query_count[segment],
    )


def _few_rows(work: _Work, rows: _Tiles, config: XlaConfig) -> tuple[Any, Any]:
    """Row by row, through a list of all rows' chunks."""
    page_size, kv_heads, head_dim = work.cache.key.shape[2:]
    outputs, width = rows.out.shape[0], work.block_table.shape[1]
    pages = min(max(1, config.chunk // page_size), width)
    chunk = pages * page_size
    at_once = max(1, config.gather_bytes // (chunk * kv_heads * head_dim * work.cache.key.dtype.itemsize))
    at_once = min(at_once, outputs * -(-width // pages))
    position = work.position[rows.query]
    lowest = jnp.maximum(rows.begin, work.first_visible(position))
    first_page = jnp.maximum(lowest, 0) // page_size
    end = jnp.where(rows.count > 0, jnp.minimum(rows.end, position + 1), 0)
    chunks = jnp.maximum(0, -(-(end - first_page * page_size) // chunk))
    until = jnp.cumsum(chunks)
    capacity = -(-outputs * -(-width // pages) // at_once) * at_once
    scores = (at_once, pages, page_size, kv_heads, work.group)

    def some_chunks(i: Any, partials: tuple[Any, Any]) -> tuple[Any, Any]:
        item = i * at_once + jnp.arange(at_once)
        row = jnp.minimum(jnp.searchsorted(until, item, side="right"), outputs - 1)
        page = first_page[row] + (item - (until[row] - chunks[row])) * pages
        k, v = work.take(work.pages(rows.table_row[row], page, pages))
        token = (page * page_size)[:, None, None] + jnp.arange(chunk).reshape(pages, page_size)
        limits = (x[row][:, None, None] for x in (position, rows.begin, end))
        visible = work.visible(token, *limits)
        q = work.query[rows.query[row]].astype(jnp.float32).reshape(at_once, 1, 1, kv_heads, work.group, head_dim)
        logits = work.capped((q * k[..., None, :]).sum(axis=-1))
        logits = jnp.where(visible[..., None, None], logits, -jnp.inf)
        peak = logits.max(axis=(1, 2))
        shift = jnp.where(jnp.isneginf(peak), 0.0, peak)
        weights = jnp.exp(logits - shift[:, None, None]).reshape(scores)
        out = _weighted_sum(weights, jnp.where(visible[..., None, None], v, 0.0))
        total = weights.sum(axis=(1, 2))
        out = out / jnp.where(total == 0, 1.0, total)[..., None]
        lse = peak + jnp.log(total)
        new = lax.dynamic_update_slice_in_dim(partials[0], out, i * at_once, 0)
        return new, lax.dynamic_update_slice_in_dim(partials[1], lse, i * at_once, 0)

    heads = (kv_heads, work.group)
    partials = (jnp.zeros((capacity, *heads, head_dim)), jnp.full((capacity, *heads), -jnp.inf))
    partials = lax.fori_loop(0, -(-until[-1] // at_once), some_chunks, partials)

    def merge(j: Any, state: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        total, weight, peak = state
        item = jnp.minimum(until - chunks + j, capacity - 1)
        lse = jnp.where((j < chunks)[:, None, None], partials[1][item], -jnp.inf)
        higher = jnp.maximum(peak, lse)
        shift = jnp.where(jnp.isneginf(higher), 0.0, higher)
        decay, share = jnp.exp(peak - shift), jnp.exp(lse - shift)
        return total * decay[..., None] + share[..., None] * partials[0][item], weight * decay + share, higher

    state = (
        jnp.zeros((outputs, *heads, head_dim)),
        jnp.zeros((outputs, *heads)),
        jnp.full((outputs, *heads), -jnp.inf),
    )
    total, weight, peak = lax.fori_loop(0, chunks.max(), merge, state)
    out, lse = finish(Carry(total, weight, peak))
    return out.reshape(outputs, -1, head_dim), lse.reshape(outputs, -1)


# Tokens whose values are added in one expression; more make long programs, fewer write longer partial sums.
_ADDENDS = 16


def _weighted_sum(weights: Any, values: Any) -> Any:
    """Values ``[n, pages, page_size, kv_heads, head_dim]`` summed over tokens, to ``[n, kv_heads, group, head_dim]``.

    Written out as a sum of products, which is vectorized over head_dim; a reduction over leading axes is not.
    """
    n, tokens = weights.shape[0], weights.shape[1] * weights.shape[2]
    addends = next(size for size in range(min(_ADDENDS, tokens), 0, -1) if tokens % size == 0)
    weights = weights.reshape(n, -1, addends, *weights.shape[3:])
    values = values.reshape(n, -1, addends, *values.shape[3:])
    some = weights[:, :, 0, :, :, None] * values[:, :, 0, :, None, :]
    for j in range(1, addends):
        some = some + weights[:, :, j, :, :, None] * values[:, :, j, :, None, :]
    # Without it, the two sums become one that is neither vectorized nor parallel.
    return lax.optimization_barrier(some).sum(axis=1)


def _many_rows(work: _Work, segments: Any, outputs: int, config: XlaConfig) -> tuple[Any, Any]:
    """Tile by tile of segments with more than a few rows."""
    page_size, kv_heads, head_dim = work.cache.key.shape[2:]
    size, width = config.tile, work.block_table.shape[1]
    pages = min(max(1, config.chunk // page_size), width)
    chunk = pages * page_size
    counts = jnp.where(segments.query_count > config.few, segments.query_count, 0)
    until = jnp.cumsum(-(-counts // size))
    query = jnp.pad(work.query, ((0, size), (0, 0), (0, 0)))
    position = jnp.pad(work.position, (0, size), constant_values=-1)
    heads = (kv_heads, work.group)
    results = (
        jnp.zeros((outputs + size, kv_heads * work.group, head_dim)),
        jnp.zeros((outputs + size, kv_heads * work.group)),
    )

    def tile(i: Any, results: tuple[Any, Any]) -> tuple[Any, Any]:
        segment = jnp.minimum(jnp.searchsorted(until, i, side="right"), until.shape[0] - 1)
        offset = (i - (until[segment] - -(-counts[segment] // size))) * size
        mine = jnp.arange(size) < counts[segment] - offset
        q = lax.dynamic_slice_in_dim(query, segments.query_begin[segment] + offset, size).astype(jnp.float32)
        q = q.reshape(size, *heads, head_dim).transpose(1, 2, 0, 3).reshape(kv_heads, -1, head_dim)
        p = lax.dynamic_slice_in_dim(position, segments.query_begin[segment] + offset, size)
        begin, end = segments.kv_begin[segment], segments.kv_end[segment]
        highest = jnp.where(mine, p, -1).max()
        lowest = jnp.where(mine, p, jnp.iinfo(jnp.int32).max).min()
        first_page = jnp.maximum(jnp.maximum(begin, work.first_visible(lowest)), 0) // page_size
        last = jnp.minimum(end, highest + 1)

        def some_tokens(j: Any, carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
            page = first_page + j * pages
            k, v = work.take(work.pages(segments.table_row[segment], page, pages))
            k, v = (x.reshape(chunk, kv_heads, head_dim) for x in (k, v))
            token = page * page_size + jnp.arange(chunk)
            visible = work.visible(token[None, :], p[:, None], begin, end)
            seen = (token < end)[:, None, None]  # what lies beyond may be anything
            logits = work.capped(jnp.einsum("krd,ckd->krc", q, jnp.where(seen, k, 0.0)))
            logits = jnp.where(jnp.tile(visible, (work.group, 1)), logits, -jnp.inf)
            return _add(carry, logits, jnp.where(seen, v, 0.0), "krc,ckd->krd")

        rows = (kv_heads, work.group * size)
        nothing = (jnp.zeros((*rows, head_dim)), jnp.zeros(rows), jnp.full(rows, -jnp.inf))
        steps = jnp.maximum(0, -(-(last - first_page * page_size) // chunk))
        out, lse = finish(Carry(*lax.fori_loop(0, steps, some_tokens, nothing)))
        out = out.reshape(*heads, size, head_dim).transpose(2, 0, 1, 3).reshape(size, -1, head_dim)
        lse = lse.reshape(*heads, size).transpose(2, 0, 1).reshape(size, -1)
        at = segments.out_begin[segment] + offset
        out = jnp.where(mine[:, None, None], out, lax.dynamic_slice_in_dim(results[0], at, size))
        lse = jnp.where(mine[:, None], lse, lax.dynamic_slice_in_dim(results[1], at, size))
        out = lax.dynamic_update_slice_in_dim(results[0], out, at, 0)
        return out, lax.dynamic_update_slice_in_dim(results[1], lse, at, 0)

    out, lse = lax.fori_loop(0, until[-1], tile, results)
    return out[:outputs], lse[:outputs]


def _add(carry: tuple[Any, Any, Any], logits: Any, values: Any, spec: str) -> tuple[Any, Any, Any]:
    """Goes on with some more tokens of a running softmax."""
    total, weight, peak = carry
    higher = jnp.maximum(peak, logits.max(axis=-1))
    shift = jnp.where(jnp.isneginf(higher), 0.0, higher)
    weights = jnp.exp(logits - shift[..., None])
    decay = jnp.exp(peak - shift)
    total = total * decay[..., None] + jnp.einsum(spec, weights, values)
    return total, weight * decay + weights.sum(axis=-1), higher


def _in_order(work: _Work, rows: _Tiles, carry: Carry) -> Carry:
    """Every row by itself, block after block in one order: element by element the same operations in any company."""
    page_size, kv_heads, head_dim = work.cache.key.shape[2:]
    outputs, width = rows.out.shape[0], work.block_table.shape[1]
    pages = ordered_block(page_size) // page_size
    position = work.position[rows.query]
    end = jnp.where(rows.count > 0, jnp.minimum(rows.end, position + 1), 0)
    heads = (kv_heads, work.group)
    q = work.query[rows.query].astype(jnp.float32).reshape(outputs, 1, 1, *heads, head_dim)
    lowest = jnp.where(end > rows.begin, jnp.maximum(rows.begin, work.first_visible(position)), width * page_size)
    first = jnp.maximum(lowest, 0).min() // (pages * page_size)

    def block(j: Any, carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        total, weight, peak = carry
        page = jnp.full(outputs, j * pages)
        k, v = work.take(work.pages(rows.table_row, page, pages))
        token = (j * pages * page_size + jnp.arange(pages * page_size)).reshape(1, pages, page_size)
        visible = work.visible(token, *(x[:, None, None] for x in (position, rows.begin, end)))
        logits = work.capped((q * k[..., None, :]).sum(axis=-1))
        logits = jnp.where(visible[..., None, None], logits, -jnp.inf)
        higher = jnp.maximum(peak, logits.max(axis=(1, 2)))
        shift = jnp.where(jnp.isneginf(higher), 0.0, higher)
        weights = jnp.exp(logits - shift[:, None, None])
        decay = jnp.exp(peak - shift)
        total = total * decay[..., None] + _weighted_sum(weights, jnp.where(visible[..., None, None], v, 0.0))
        return total, weight * decay + weights.sum(axis=(1, 2)), higher

    grouped = (
        carry.total.reshape(outputs, *heads, head_dim),
        *(x.reshape(outputs, *heads) for x in (carry.weight, carry.peak)),
    )
    total, weight, peak = lax.fori_loop(first, -(-end.max() // (pages * page_size)), block, grouped)
    return Carry(total.reshape(carry.total.shape), weight.reshape(carry.weight.shape), peak.reshape(carry.peak.shape))
