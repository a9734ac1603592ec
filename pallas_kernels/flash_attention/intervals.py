"""Masks as one interval of keys for each query: causality, windows, lengths and packed documents are all of this kind.

Row ``i`` sees keys ``start <= j < stop``; where ``start >= stop`` it sees nothing. An array of intervals is
``[batch, queries, 2]``, or ``[1, queries, 2]`` if all of the batch have the same. NumPy arrays in give NumPy arrays
out, so what is static stays static; anything traced gives JAX arrays.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

Intervals = Int[Array | np.ndarray, "batch queries 2"]


class Tiles(NamedTuple):
    """Which tiles to visit along one axis of the scores, for each tile along the other.

    ``first <= first_full <= last_full <= last``: tiles of ``first .. first_full`` and ``last_full .. last`` want the
    mask, those of ``first_full .. last_full`` are visible as a whole, and all others hold nothing that is visible.

    Attributes:
      first, last: visit ``first <= tile < last``; ``first == last``: none.
      first_full, last_full: no mask is needed in ``first_full <= tile < last_full``.
    """

    first: Int[Array | np.ndarray, "batch tiles"]
    last: Int[Array | np.ndarray, "batch tiles"]
    first_full: Int[Array | np.ndarray, "batch tiles"]
    last_full: Int[Array | np.ndarray, "batch tiles"]


def self_intervals(
    length: int,
    window: int | Int[Array, ""] | None = None,
    segment_ids: Int[Array | np.ndarray, "batch length"] | None = None,
) -> Intervals:
    """Those of causal self-attention: a token sees itself and what came before it.

    Args:
      length: tokens in a row.
      window: no key further back than ``window - 1`` is seen; may be traced; ``None``: all.
      segment_ids: packed documents; a segment is a run of equal ids, and a token sees only its own. ``None``: one.

    Returns:
      ``[1, length, 2]``, or ``[batch, length, 2]`` with segments.
    """
    xp = _namespace(window, segment_ids)
    index = np.arange(length, dtype=np.int32)[None]
    start = xp.zeros_like(index)
    if window is not None:
        window = min(window, length) if isinstance(window, int) else window
        start = xp.maximum(start, index - window + 1)
    if segment_ids is not None:
        begins = xp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
        begin = xp.where(begins, index, 0)
        start = xp.maximum(start, np.maximum.accumulate(begin, 1) if xp is np else jax.lax.cummax(begin, axis=1))
    stop = xp.zeros_like(start) + index + 1  # cut over a mesh as the start is
    return xp.stack([start, stop], axis=-1).astype(np.int32)


def segment_intervals(length: int, segment_ids: Int[Array | np.ndarray, "batch length"] | None = None) -> Intervals:
    """Those of an encoder: a token sees all of its segment, before and after it.

    Args:
      length: tokens in a row.
      segment_ids: packed documents; a segment is a run of equal ids. ``None``: one.

    Returns:
      ``[1, length, 2]``, or ``[batch, length, 2]`` with segments.
    """
    index = np.arange(length, dtype=np.int32)[None]
    if segment_ids is None:
        return np.stack([np.zeros_like(index), np.full_like(index, length)], axis=-1)
    xp = _namespace(segment_ids)
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    begin = xp.where(xp.pad(changes, ((0, 0), (1, 0))), index, 0)
    end = xp.where(xp.pad(changes, ((0, 0), (0, 1))), index + 1, length)
    start: Any
    stop: Any
    if xp is np:
        start, stop = np.maximum.accumulate(begin, 1), np.minimum.accumulate(end[:, ::-1], 1)[:, ::-1]
    else:
        start, stop = jax.lax.cummax(begin, axis=1), jax.lax.cummin(end, axis=1, reverse=True)
    return xp.stack([start, stop], axis=-1).astype(np.int32)


class Band(NamedTuple):
    """Known when a program is traced: row ``i`` sees no key outside ``i - before <= j <= i + after``."""

    before: int
    after: int


def static_band(intervals: Any) -> Band:
    """The narrowest band that holds intervals in a NumPy array."""
    start, stop = intervals[..., 0], intervals[..., 1]
    row, some = np.arange(intervals.shape[1]), start < stop
    if not some.any():
        return Band(0, -1)
    return Band(int(np.max((row - start)[some])), int(np.max((stop - 1 - row)[some])))


def clipped(intervals: Intervals, keys: int) -> Intervals:
    """Within ``0 <= start, stop <= keys``."""
    return _namespace(intervals).clip(intervals, 0, keys)


def tile_bounds(intervals: Intervals, block_q: int, block_kv: int, keys: int) -> Tiles:
    """For each tile of queries the tiles of keys that forward and dQ visit.

    Args:
      intervals: of the queries.
      block_q: queries in a tile; the rows that pad the last one see nothing, so that it is never full.
      block_kv: keys in a tile; the last is not full unless it is whole.
      keys: number of keys.

    Returns:
      Bounds among ``ceil(keys / block_kv)`` tiles, each ``[batch, ceil(queries / block_q)]``. The range is the least
      that covers what all rows of the tile see.
    """
    xp = _namespace(intervals)
    intervals = clipped(intervals, keys)
    batch, queries, _ = intervals.shape
    count = -(-queries // block_q)
    rows = xp.pad(intervals, ((0, 0), (0, count * block_q - queries), (0, 0))).reshape(batch, count, block_q, 2)
    start, stop = rows[..., 0], rows[..., 1]
    empty = start >= stop
    last = xp.where(empty, 0, -(-stop // block_kv)).max(-1)
    first = xp.minimum(xp.where(empty, keys, start).min(-1) // block_kv, last)
    first_full = xp.clip(-(-start.max(-1) // block_kv), first, last)
    last_full = xp.clip(xp.where(empty.any(-1), 0, stop.min(-1) // block_kv), first_full, last)
    return Tiles(first, last, first_full, last_full)


def transposed_tile_bounds(intervals: Intervals, block_q: int, block_kv: int, keys: int) -> Tiles:
    """For each tile of keys the tiles of queries that dK and dV visit; see `tile_bounds` for the arguments.

    Returns:
      Bounds among ``ceil(queries / block_q)`` tiles, each ``[batch, ceil(keys / block_kv)]``. Between the first and the
      last that see something there may be tiles that see nothing; the full ones are the first run of them.
    """
    xp = _namespace(intervals)
    seen = tile_bounds(intervals, block_q, block_kv, keys)
    tile = np.arange(-(-keys // block_kv), dtype=np.int32)[None, :, None]
    row = np.arange(seen.first.shape[1], dtype=np.int32)  # the tiles of queries, along the last axis

    def within(first: Any, last: Any) -> Any:
        return (first[:, None] <= tile) & (tile < last[:, None])

    visible, full = within(seen.first, seen.last), within(seen.first_full, seen.last_full)
    last = xp.where(visible, row + 1, 0).max(-1)
    first = xp.minimum(xp.where(visible, row, len(row)).min(-1), last)
    first_full = xp.clip(xp.where(full, row, len(row)).min(-1), first, last)
    ends = ~full & (row >= first_full[..., None])
    last_full = xp.clip(xp.where(ends, row, len(row)).min(-1), first_full, last)
    return Tiles(first, last, first_full, last_full)


def _namespace(*arrays: Any) -> Any:
    return jnp if any(isinstance(x, jax.Array) for x in arrays) else np
