"""Blocked attention in plain XLA operations: the path for CPU, and for any platform without a kernel of its own.

By the recurrences of FlashAttention (Dao et al. 2022, algorithms 1 and 4; Dao 2023, section 3.1), so that no array of
scores is larger than one block, forward or backward. The blocks are of two kinds. Where it is known when tracing what
the queries may see (`Band`), and they are not too many, the program is unrolled over blocks of queries, and each is
multiplied at once with all the keys that it may see. Else two loops run over tiles of queries and of keys, from the
first to the last tile that `tile_bounds` finds.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.flash_attention.intervals import Band, clipped, tile_bounds, transposed_tile_bounds

# The weighted sum of values, the greatest logit and the sum of weights; or the gradients of query, key and value.
_Sums = tuple[jax.Array, jax.Array, jax.Array]
# ``((first query, after the last), (first key, after the last))`` of each.
_Blocks = list[tuple[tuple[int, int], tuple[int, int]]]


@dataclasses.dataclass(frozen=True)
class XlaConfig:
    """Sizes of blocks.

    Attributes:
      block: queries of an unrolled block: their scores against a few thousand keys stay in a core's cache.
      max_blocks: beyond so many the unrolled program grows long, and its blocks too wide for a cache; loops take over.
      tile_q, tile_kv: queries and keys of a loop's tile, at most: enough work for a matrix unit, few enough that the
        scores of all heads stay small.
    """

    block: int = 128
    max_blocks: int = 16
    tile_q: int = 256
    tile_kv: int = 512

    def tiles(self, queries: int, keys: int) -> tuple[int, int]:
        """Sizes of tiles of which a whole number covers the lengths with the least left over."""
        fit = lambda length, most: -(-length // -(-length // most))  # noqa: E731
        return fit(queries, self.tile_q), fit(keys, self.tile_kv)


def why_not(query: Any, key: Any, value: Any, *, softcap: float | None, config: Any) -> str | None:
    """See `pallas_kernels.flash_attention.backend.Backend`; all cases are supported."""
    if config is not None and not isinstance(config, XlaConfig):
        return f"config={config!r} is not an XlaConfig"
    return None


def unrolled_blocks(config: XlaConfig, band: Band | None, queries: int, keys: int) -> _Blocks | None:
    """Blocks of queries, and the keys that each may see: at least one key, since empty arrays are to be avoided.

    Returns:
      ``((first query, after the last), (first key, after the last))``, or ``None`` where loops run.
    """
    if band is None or queries > config.block * config.max_blocks:
        return None
    blocks = []
    for start in range(0, queries, config.block):
        stop = min(start + config.block, queries)
        first = min(max(0, start - band.before), keys - 1)
        blocks.append(((start, stop), (first, max(first + 1, min(keys, stop + band.after)))))
    return blocks


def forward(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads head_dim"],
    intervals: Int[Array, "batch queries 2"],
    *,
    scale: float,
    softcap: float | None,
    out_dtype: Any = None,
    config: XlaConfig | None = None,
    band: Band | None = None,
) -> tuple[Float[Array, "batch queries heads head_dim"], Float[Array, "batch queries heads"]]:
    """See `pallas_kernels.flash_attention.backend.Backend.forward`; ``band`` is a promise about the intervals."""
    config, out_dtype = config or XlaConfig(), out_dtype or query.dtype
    if not query.shape[1] or not key.shape[1]:
        return jnp.zeros_like(query, out_dtype), jnp.full_like(query[..., 0], -jnp.inf, jnp.float32)
    q, k, v = _grouped(query, key), _heads_first(key), _heads_first(value)
    intervals = jnp.asarray(clipped(intervals, key.shape[1]))
    blocks = unrolled_blocks(config, band, query.shape[1], key.shape[1])
    attend = functools.partial(_attend, scale=scale, softcap=softcap)
    if blocks is not None:
        out, lse = _forward_unrolled(attend, blocks, q, k, v, intervals, out_dtype)
    else:
        out, lse = _forward_loops(attend, config, q, k, v, intervals, out_dtype)
    return _ungrouped(out), _ungrouped(lse)


def _forward_unrolled(attend: Any, blocks: _Blocks, q: Any, k: Any, v: Any, intervals: Any, dtype: Any) -> Any:
    parts: list[Any] = []
    for (start, stop), (first, last) in blocks:
        block = q[..., start:stop, :], k[:, :, first:last], v[:, :, first:last], intervals[:, start:stop]
        if parts:
            # One block after the other: a scheduler that is free to would keep the scores of all at once.
            parts[-1], block = jax.lax.optimization_barrier((parts[-1], block))
        parts.append(_finished(attend(*block, first), dtype))
    return tuple(jnp.concatenate(x, axis=3) for x in zip(*parts, strict=True))


def _forward_loops(attend: Any, config: XlaConfig, q: Any, k: Any, v: Any, intervals: Any, dtype: Any) -> Any:
    queries, keys = q.shape[3], k.shape[2]
    tile_q, tile_kv = config.tiles(queries, keys)
    tiles = tile_bounds(intervals, tile_q, tile_kv, keys)
    first, last = tiles.first.min(axis=0), tiles.last.max(axis=0)
    q, k, v, intervals = (
        _padded(x, size, axis)
        for x, size, axis in ((q, tile_q, 3), (k, tile_kv, 2), (v, tile_kv, 2), (intervals, tile_q, 1))
    )
    some = q[..., :tile_q, :]
    nothing = tuple(_like(x, y, k, intervals) for x, y in ((some, 0.0), (some[..., 0], -jnp.inf), (some[..., 0], 0.0)))

    def row(i: Any) -> Any:
        q_tile, visible = _tile(q, i, tile_q, 3), _tile(intervals, i, tile_q, 1)

        def add(j: Any, sums: _Sums) -> _Sums:
            part = attend(q_tile, _tile(k, j, tile_kv, 2), _tile(v, j, tile_kv, 2), visible, j * tile_kv)
            return _together(sums, part)

        return _finished(jax.lax.fori_loop(first[i], last[i], add, nothing), dtype)

    out, lse = jax.lax.map(row, jnp.arange(first.shape[0]))
    return _joined(out, 3)[..., :queries, :], _joined(lse, 3)[..., :queries]


def backward(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads head_dim"],
    lse: Float[Array, "batch queries heads"],
    delta: Float[Array, "batch queries heads"],
    out_gradient: Float[Array, "batch queries heads head_dim"],
    intervals: Int[Array, "batch queries 2"],
    *,
    scale: float,
    softcap: float | None,
    out_dtype: Any = None,
    config: XlaConfig | None = None,
    band: Band | None = None,
) -> tuple[
    Float[Array, "batch queries heads head_dim"],
    Float[Array, "batch keys kv_heads head_dim"],
    Float[Array, "batch keys kv_heads head_dim"],
]:
    """See `pallas_kernels.flash_attention.backend.Backend.backward`; ``band`` is a promise about the intervals."""
    config = config or XlaConfig()
    dtypes = [out_dtype or x.dtype for x in (query, key, value)]
    results: Any = query, key, value
    if query.shape[1] and key.shape[1]:
        per_row = tuple(_grouped(x, key) for x in (query, out_gradient.astype(value.dtype), lse, delta))
        k, v = _heads_first(key), _heads_first(value)
        intervals = jnp.asarray(clipped(intervals, key.shape[1]))
        blocks = unrolled_blocks(config, band, query.shape[1], key.shape[1])
        gradients = functools.partial(_gradients, scale=scale, softcap=softcap)
        if blocks is not None:
            dq, dk, dv = _backward_unrolled(gradients, blocks, per_row, k, v, intervals, dtypes[0])
        else:
            dq, dk, dv = _backward_loops(gradients, config, per_row, k, v, intervals)
        results = _ungrouped(dq), _heads_first(dk), _heads_first(dv)
    else:
        results = tuple(jnp.zeros_like(x) for x in results)
    dq, dk, dv = (x.astype(dtype) for x, dtype in zip(results, dtypes, strict=True))
    return dq, dk, dv


def _backward_unrolled(
    gradients: Any, blocks: _Blocks, per_row: Any, k: Any, v: Any, intervals: Any, dtype: Any
) -> _Sums:
    parts: list[Any] = []
    dk, dv = (_like(x, 0.0, per_row[0], intervals) for x in (k, v))
    for (start, stop), (first, last) in blocks:
        rows = tuple(jax.lax.slice_in_dim(x, start, stop, axis=3) for x in per_row)
        block = rows, k[:, :, first:last], v[:, :, first:last], intervals[:, start:stop]
        if parts:
            (dk, dv), block = jax.lax.optimization_barrier(((dk, dv), block))
        dq_part, dk_part, dv_part = gradients(*block, first)
        parts.append(dq_part.astype(dtype))
        dk, dv = _added(dk, dk_part, first, 2), _added(dv, dv_part, first, 2)
    return jnp.concatenate(parts, axis=3), dk, dv


def _backward_loops(gradients: Any, config: XlaConfig, per_row: Any, k: Any, v: Any, intervals: Any) -> _Sums:
    queries, keys = intervals.shape[1], k.shape[2]
    tile_q, tile_kv = config.tiles(queries, keys)
    tiles = transposed_tile_bounds(intervals, tile_q, tile_kv, keys)
    first, last = tiles.first.min(axis=0), tiles.last.max(axis=0)
    per_row = tuple(_padded(x, tile_q, 3) for x in per_row)
    k, v, intervals = _padded(k, tile_kv, 2), _padded(v, tile_kv, 2), _padded(intervals, tile_q, 1)
    nothing = tuple(_like(x[:, :, :tile_kv], 0.0, intervals, per_row[0]) for x in (k, v))

    def column(dq: jax.Array, j: Any) -> Any:
        k_tile, v_tile = _tile(k, j, tile_kv, 2), _tile(v, j, tile_kv, 2)

        def add(i: Any, sums: _Sums) -> _Sums:
            rows = tuple(_tile(x, i, tile_q, 3) for x in per_row)
            parts = gradients(rows, k_tile, v_tile, _tile(intervals, i, tile_q, 1), j * tile_kv)
            return _added(sums[0], parts[0], i * tile_q, 3), sums[1] + parts[1], sums[2] + parts[2]

        dq, dk, dv = jax.lax.fori_loop(first[j], last[j], add, (dq, *nothing))
        return dq, (dk, dv)

    dq, (dk, dv) = jax.lax.scan(column, _like(per_row[0], 0.0, intervals, k), jnp.arange(first.shape[0]))
    return dq[..., :queries, :], _joined(dk, 2)[:, :, :keys], _joined(dv, 2)[:, :, :keys]


def _attend(q, k, v, intervals, first, scale, softcap) -> _Sums:
    """What queries ``[b, kv, group, rows, d]`` see of keys ``[b, kv, columns, d]``, the first of which is ``first``.

    Returns:
      The weighted sum of values, the greatest logit, and the sum of weights, which are relative to it.
    """
    logits, visible, _ = _logits(q, k, intervals, first, scale, softcap)
    logits = jnp.where(visible, logits, -jnp.inf)
    peak = logits.max(axis=-1)
    weights = jnp.exp(logits - _finite(peak)[..., None])
    return _dot("bhgqk,bhkd->bhgqd", weights.astype(v.dtype), v), peak, weights.sum(axis=-1)


def _together(one: _Sums, other: _Sums) -> _Sums:
    """Of both sets of keys."""
    peak = jnp.maximum(one[1], other[1])
    shares = [jnp.exp(x[1] - _finite(peak)) for x in (one, other)]
    out = one[0] * shares[0][..., None] + other[0] * shares[1][..., None]
    return out, peak, one[2] * shares[0] + other[2] * shares[1]


def _finished(sums: _Sums, dtype: Any) -> tuple[jax.Array, jax.Array]:
    out, peak, total = sums
    return (out / jnp.where(total == 0, 1.0, total)[..., None]).astype(dtype), peak + jnp.log(total)


def _gradients(rows, k, v, intervals, first, scale, softcap) -> _Sums:
    """What a block adds to dQ, dK and dV; ``rows`` are queries, output gradients, log-sum-exps and deltas."""
    q, dout, lse, delta = rows
    logits, visible, slope = _logits(q, k, intervals, first, scale, softcap)
    weights = jnp.where(visible, jnp.exp(logits - lse[..., None]), 0.0)  # of a row that sees nothing, lse is -inf
    dweights = _dot("bhgqd,bhkd->bhgqk", dout, v)
    dlogits = weights * (dweights - delta[..., None]) * scale
    dlogits = (dlogits if slope is None else dlogits * slope).astype(k.dtype)
    # Held back from being fused into the transpositions that two of the products want, one exponential at a time.
    weights, dlogits = jax.lax.optimization_barrier((weights.astype(dout.dtype), dlogits))
    return (
        _dot("bhgqk,bhkd->bhgqd", dlogits, k),
        _dot("bhgqk,bhgqd->bhkd", dlogits, q),
        _dot("bhgqk,bhgqd->bhkd", weights, dout),
    )


def _logits(q, k, intervals, first, scale, softcap):
    """Logits, which of them are visible, and the derivative of soft-capping (``None``: 1)."""
    logits, slope = _dot("bhgqd,bhkd->bhgqk", q, k) * scale, None
    if softcap is not None:
        bounded = jnp.tanh(logits / softcap)
        logits, slope = softcap * bounded, 1.0 - jnp.square(bounded)
    start, stop = (intervals[:, None, None, :, i, None] for i in range(2))
    column = first + jnp.arange(k.shape[2], dtype=jnp.int32)
    # Computed once for all heads, as whole words: fused into every use it would be what takes the most time on CPU.
    visible = jax.lax.optimization_barrier(((start <= column) & (column < stop)).astype(jnp.int32))
    return logits, visible != 0, slope


def _finite(peak: jax.Array) -> jax.Array:
    """Where nothing was seen all weights are 0, and none is NaN."""
    return jnp.where(jnp.isneginf(peak), 0.0, peak)


def _dot(spec: str, *operands: jax.Array) -> jax.Array:
    return jnp.einsum(spec, *operands, preferred_element_type=jnp.float32)


def _heads_first(x: jax.Array) -> jax.Array:
    """``[batch, length, heads, ...]`` as ``[batch, heads, length, ...]``, and back."""
    return jnp.swapaxes(x, 1, 2)


def _grouped(x: jax.Array, key: jax.Array) -> jax.Array:
    """``[batch, queries, heads, ...]`` as ``[batch, kv_heads, group, queries, ...]``."""
    x = x.reshape(*x.shape[:2], key.shape[2], x.shape[2] // key.shape[2], *x.shape[3:])
    return jnp.moveaxis(x, 1, 3)


def _ungrouped(x: jax.Array) -> jax.Array:
    x = jnp.moveaxis(x, 3, 1)
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3], *x.shape[4:])


def _padded(x: jax.Array, size: int, axis: int) -> jax.Array:
    """With whole tiles: added queries see nothing (their interval is empty), added keys are in no interval."""
    extra = -x.shape[axis] % size
    return jnp.pad(x, [(0, extra if i == axis else 0) for i in range(x.ndim)]) if extra else x


def _tile(x: jax.Array, i: Any, size: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=axis)


def _added(x: jax.Array, part: jax.Array, start: Any, axis: int) -> jax.Array:
    """``x`` with a part of it increased, in place where the compiler can (a scatter would be slow on CPU)."""
    part = part + jax.lax.dynamic_slice_in_dim(x, start, part.shape[axis], axis=axis)
    return jax.lax.dynamic_update_slice_in_dim(x, part, start, axis=axis)


def _joined(tiles: jax.Array, axis: int) -> jax.Array:
    """``[tiles, ...]`` with the tiles side by side along ``axis`` of what follows."""
    tiles = jnp.moveaxis(tiles, 0, axis)
    return tiles.reshape(*tiles.shape[:axis], -1, *tiles.shape[axis + 2 :])


def _like(x: jax.Array, value: float, *others: jax.Array) -> jax.Array:
    """A float32 array of one value, cut over a mesh like ``x``.

    Within a `shard_map` a loop must begin with values that differ over the axes over which its results will.
    """
    full = jnp.full_like(x, value, jnp.float32)
    axes = frozenset().union(*(jax.typeof(y).manual_axis_type.varying for y in (x, *others)))
    axes -= jax.typeof(full).manual_axis_type.varying
    return jax.lax.pcast(full, tuple(axes), to="varying") if axes else full
