"""The core in plain XLA operations: the path for CPU, and for any platform without a kernel for the case.

Loops run as long as the longest need, over chunks of tokens that are gathered into the cache of a core, widened to
float32 and multiplied there. Rows that are alone in their segment share steps (`xla_rows`), many rows of one segment
share products (`xla_tiles`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.paged_attention.cache import PagedCache
from pallas_kernels.paged_attention.segments import Carry, ordered_block
from pallas_kernels.paged_attention.xla_rows import attend_rows, attend_short_rows
from pallas_kernels.paged_attention.xla_scores import seen
from pallas_kernels.paged_attention.xla_tiles import attend_tiles

# Bytes of keys in float32: chunks are no larger, and lanes are added until a step has work for all cores.
_CHUNK_BYTES, _STEP_BYTES = 2**19, 2**19
# More of them only make steps larger than a core's cache.
_MOST_LANES, _MOST_SHORT_LANES = 4, 16
# Tokens of a chunk of short rows; most tokens of one where all heads are multiplied with all.
_SHORT_CHUNK, _WIDE_CHUNK = 32, 128
# Up to so many query heads, all of them times all keys cost less than to bring the keys of each head together.
_WIDE_HEADS = 16


@dataclasses.dataclass(frozen=True)
class XlaConfig:
    """How the work is cut.

    Attributes:
      lanes: chunks of rows that are alone in their segment computed in one step.
      chunk: tokens of a chunk.
      tile: rows of a segment multiplied at once.
      wide: of rows that are alone, multiply all heads with all: more work, but on keys and values as they are stored.
      short: rows that see no more tokens are computed in the order of their lengths.
    """

    lanes: int
    chunk: int
    tile: int
    wide: bool = False
    short: int = 128

    def __post_init__(self):
        for field in ("lanes", "chunk", "tile", "short"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{field}={value!r}; it must be a whole number of at least 1")


def heuristic(query: Any, cache: PagedCache, block_table: Any) -> XlaConfig:
    """From the shapes alone."""
    kv_heads, head_dim = cache.key.shape[3:]
    group = query.shape[1] // kv_heads
    per_token = 4 * kv_heads * head_dim
    longest = block_table.shape[1] * cache.page_size
    tile = min(max(256 // group, 1), _ceil_power(query.shape[0]))
    if query.shape[1] <= _WIDE_HEADS or group == 1:
        lanes = min(_MOST_LANES, block_table.shape[0])
        return XlaConfig(lanes=lanes, chunk=min(_WIDE_CHUNK, _ceil_power(longest)), tile=tile, wide=True)
    chunk = min(max(_floor_power(_CHUNK_BYTES // per_token), 128), 512, _ceil_power(longest))
    lanes = min(max(_STEP_BYTES // (chunk * per_token), 1), _MOST_LANES, block_table.shape[0])
    return XlaConfig(lanes=lanes, chunk=chunk, tile=tile)


def why_not(query: Any, cache: PagedCache, *, decode: bool) -> str | None:
    """Supports all that `pallas_kernels.paged_attention.checks` admits."""
    del query, cache, decode
    return None


def attend(
    query,
    position,
    cache: PagedCache,
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
    config: XlaConfig | None = None,
):
    """See `pallas_kernels.paged_attention.segments`."""
    kv_heads = cache.key.shape[3]
    rows, heads, head_dim = query.shape
    group = heads // kv_heads
    config = heuristic(query, cache, block_table) if config is None else config
    layer = jnp.asarray(layer, jnp.int32)
    grouped = (query.astype(jnp.float32) * scale).reshape(rows, kv_heads, group, head_dim)
    operands = grouped, position, cache, layer, block_table, segments
    scores = {"window": window, "softcap": softcap}
    if ordered:
        carry = Carry.nothing(outputs, heads, head_dim) if carry is None else carry
        carry = jax.tree.map(lambda x: x.reshape(outputs, kv_heads, group, *x.shape[2:]), carry)
        # Every product has this shape, so it should be wide enough for many rows and not too wide for one.
        tile = max(1, _ORDERED_ROWS // group)
        active = segments.query_count > 0
        carry = attend_tiles(*operands, active, carry, tile=tile, chunk=ordered_block(cache.page_size), **scores)
        return jax.tree.map(lambda x: x.reshape(outputs, heads, *x.shape[3:]), carry)
    alone = segments.query_count == 1
    # What is short next to a chunk, as a sequence behind its shared prefix, would mostly be padding.
    first = jnp.clip(segments.query_begin, 0, rows - 1)
    low, high = seen(position[first], segments.kv_begin, segments.kv_end, window)
    longest = block_table.shape[1] * cache.page_size
    short = (high - low <= config.short) | (longest <= config.short)
    lanes = max(_STEP_BYTES // (_SHORT_CHUNK * 4 * kv_heads * head_dim), 1)
    lanes, chunk = min(lanes, _MOST_SHORT_LANES, alone.size), min(_SHORT_CHUNK, config.chunk)
    shape = (alone.size, kv_heads, group)
    nothing = jnp.zeros((*shape, head_dim)), jnp.full(shape, -jnp.inf)
    rows_options: dict[str, Any] = {"wide": config.wide, **scores}

    def short_rows(_):
        return attend_short_rows(*operands, alone & short, lanes=lanes, chunk=chunk, **rows_options)

    def long_rows(results):
        mine = alone & ~short
        lanes = min(config.lanes, alone.size)
        new = attend_rows(*operands, mine, lanes=lanes, chunk=config.chunk, **rows_options)
        return tuple(jnp.where(mine.reshape(-1, *(1,) * (x.ndim - 1)), x, y) for x, y in zip(new, results, strict=True))

    # Below a shared prefix no row is alone, behind it few are long: what would do nothing is left out.
    out, lse = lax.cond((alone & short).any(), short_rows, lambda results: results, nothing)
    if longest > config.short:
        out, lse = lax.cond((alone & ~short).any(), long_rows, lambda results: results, (out, lse))
    # Which segment an output row belongs to.
    index = jnp.where(alone, segments.out_begin, outputs)
    owner = jnp.full(outputs, -1, jnp.int32).at[index].set(jnp.arange(alone.size, dtype=jnp.int32), mode="drop")
    out, lse = (x[jnp.maximum(owner, 0)].reshape(outputs, heads, *x.shape[3:]) for x in (out, lse))
    if decode:
        return out, lse
    carry = Carry.nothing(outputs, heads, head_dim)
    carry = jax.tree.map(lambda x: x.reshape(outputs, kv_heads, group, *x.shape[2:]), carry)
    carry = attend_tiles(*operands, segments.query_count > 1, carry, tile=config.tile, chunk=config.chunk, **scores)
    tiled_out, tiled_lse = finish(jax.tree.map(lambda x: x.reshape(outputs, heads, *x.shape[3:]), carry))
    mine = owner >= 0
    return jnp.where(mine[:, None, None], out, tiled_out), jnp.where(mine[:, None], lse, tiled_lse)


def finish(carry: Carry):
    """The output and its log-sum-exp, from a `Carry` whose unit of ``peak`` is the natural logarithm."""
    out = carry.total / jnp.where(carry.weight == 0, 1.0, carry.weight)[..., None]
    return out, carry.peak + jnp.log(carry.weight)


# Query vectors of a kv head in the products of an ordered computation.
_ORDERED_ROWS = 16


def _floor_power(x: int) -> int:
    return 1 << max(0, x.bit_length() - 1)


def _ceil_power(x: int) -> int:
    return 1 << max(0, x - 1).bit_length()
