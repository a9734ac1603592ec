"""Segments of many rows, as in prefill and below a shared prefix: one tile of rows after the other, against chunks."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.paged_attention import xla_chunks
from pallas_kernels.paged_attention.cache import PagedCache
from pallas_kernels.paged_attention.segments import Carry
from pallas_kernels.paged_attention.xla_scores import PRECISION, capped, seen


def attend_tiles(
    query, position, cache: PagedCache, layer, block_table, segments, active, carry, *, tile, chunk, **scores
):
    """Goes on from ``carry`` with the tokens of the segments that are ``active``.

    A tile is ``tile`` rows of one segment, of which the last may be empty. Its chunks begin at multiples of ``chunk``
    tokens, and every product has the same shape: so a row's bits depend neither on the rows around it nor on how its
    tokens are cut into calls at such multiples.

    Args:
      query: ``[rows, kv_heads, group, head_dim]``, float32 and scaled.
      position, cache, layer, block_table, segments: see `pallas_kernels.paged_attention.segments`.
      active: which segments.
      carry: ``[outputs, kv_heads, group(, head_dim)]``.
      tile: rows of a tile.
      chunk: tokens of a chunk.
      **scores: ``window`` and ``softcap``.
    """
    rows, kv_heads, group, head_dim = query.shape
    outputs = carry.weight.shape[0]
    tiles = jnp.where(active, -(-segments.query_count // tile), 0)
    ends = jnp.cumsum(tiles, dtype=jnp.int32)
    member = jnp.arange(tile, dtype=jnp.int32)
    # Room for the empty rows of the last tile.
    carry = jax.tree.map(lambda x: jnp.pad(x, ((0, tile),) + ((0, 0),) * (x.ndim - 1)), carry)

    def one_tile(i, carry):
        segment = jnp.searchsorted(ends, i, side="right").astype(jnp.int32)
        begin = (i - (ends - tiles)[segment]) * tile
        mine = member < segments.query_count[segment] - begin
        row = jnp.clip(segments.query_begin[segment] + begin + member, 0, rows - 1)
        q = query[row].transpose(1, 0, 2, 3).reshape(1, kv_heads, tile * group, head_dim)
        low, high = seen(position[row], segments.kv_begin[segment], segments.kv_end[segment], scores["window"])
        high = jnp.where(mine, high, 0)
        sees = low < high
        first = jnp.min(jnp.where(sees, low, jnp.iinfo(jnp.int32).max))
        last = jnp.max(jnp.where(sees, high, 0))
        low, high = jnp.broadcast_to(low, mine.shape)[:, None], high[:, None]
        table = block_table[jnp.clip(segments.table_row[segment], 0, block_table.shape[0] - 1)][None]
        out_begin = segments.out_begin[segment] + begin

        def one_chunk(c, state):
            start = c * chunk
            where = xla_chunks.locate(
                table, start[None], first[None], last[None], tokens=chunk, page_size=cache.page_size
            )
            token = start + jnp.arange(chunk, dtype=jnp.int32)
            visible = (token >= low) & (token < high)
            return _add(state, q, cache, layer, where, visible, scores["softcap"])

        def read(x):
            x = lax.dynamic_slice_in_dim(x, out_begin, tile)
            return x.swapaxes(0, 1).reshape(1, kv_heads, tile * group, *x.shape[3:])

        old = jax.tree.map(read, carry)
        chunks = jnp.where(first < last, first // chunk, 0), jnp.where(first < last, -(-last // chunk), 0)
        new = lax.fori_loop(*chunks, one_chunk, old)

        def write(to, x):
            x = x.reshape(kv_heads, tile, group, *x.shape[3:]).swapaxes(0, 1)
            x = jnp.where(mine.reshape(tile, *(1,) * (x.ndim - 1)), x, lax.dynamic_slice_in_dim(to, out_begin, tile))
            return lax.dynamic_update_slice_in_dim(to, x, out_begin, 0)

        return jax.tree.map(write, carry, new)

    carry = lax.fori_loop(0, ends[-1], one_tile, carry)
    return jax.tree.map(lambda x: x[:outputs], carry)


def _add(carry: Carry, q, cache: PagedCache, layer, where: xla_chunks.Chunk, visible, softcap):
    """Adds a chunk; ``q`` and ``carry`` are ``[1, kv_heads, tile * group(, head_dim)]``, visible ``[tile, chunk]``."""
    key = xla_chunks.by_head(cache.key, layer, where)
    logits = jnp.einsum("rhmd,rhtd->rhmt", q, key, precision=PRECISION())
    if cache.key_scale is not None:
        logits = logits * xla_chunks.scales(cache.key_scale, layer, where)[:, :, None]
    visible = jnp.repeat(visible, q.shape[2] // visible.shape[0], axis=0)
    logits = jnp.where(visible, capped(logits, softcap), -jnp.inf)
    peak = jnp.maximum(carry.peak, logits.max(axis=-1))
    shift = jnp.where(jnp.isneginf(peak), 0.0, peak)
    weights = jnp.exp(logits - shift[..., None])
    decay = jnp.exp(carry.peak - shift)
    weight = carry.weight * decay + weights.sum(axis=-1)
    if cache.value_scale is not None:
        weights = weights * xla_chunks.scales(cache.value_scale, layer, where)[:, :, None]
    value = xla_chunks.by_head(cache.value, layer, where)
    new = jnp.einsum("rhmt,rhtd->rhmd", weights, value, precision=PRECISION())
    # A row that sees nothing of the chunk keeps its bits, the sign of a zero too.
    any_seen = visible.any(axis=-1)
    return dataclasses.replace(
        carry,
        total=jnp.where(any_seen[:, None], carry.total * decay[..., None] + new, carry.total),
        weight=jnp.where(any_seen, weight, carry.weight),
        peak=peak,
    )
