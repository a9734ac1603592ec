"""Attention to a part of the keys, in plain XLA: results that carry their log-sum-exp, so that parts merge exactly.

What a device of a ring computes at each step (Liu et al. 2023, Ring Attention), by the recurrences of FlashAttention
(Dao et al. 2022, algorithms 1 and 4; Dao 2023, section 3.1). Queries and keys are cut into blocks; a pair of blocks in
which no query may see a key is not computed, and the largest array of scores is ``[batch, heads, *blocks]``.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

# Most queries and keys in a block: enough work for a matrix unit, few enough that the scores of all heads stay small.
BLOCKS = (256, 512)

Result = tuple[Float[Array, "batch queries heads head_dim"], Float[Array, "batch queries heads"]]


def fit_blocks(length: int) -> tuple[int, int]:
    """The sizes of blocks, at most `BLOCKS`, of which a whole number covers ``length`` with the least left over."""
    query, key = (-(-length // -(-length // block)) for block in BLOCKS)
    return query, key


def visible_blocks(
    query_index: Int[Array | np.ndarray, " queries"],
    key_index: Int[Array | np.ndarray, " keys"],
    window: int | Int[Array, ""] | None,
    blocks: tuple[int, int],
) -> Bool[Array | np.ndarray, "query_blocks key_blocks"]:
    """The pairs of blocks that `forward` and `backward` compute: those in which some query may see some key.

    Counts and computes alike: NumPy arrays give a NumPy array, traced ones a traced one. Exact where a block's indices
    are consecutive; otherwise their range is taken, which may add pairs and never loses one.
    """
    first_query, last_query = (x[:, None] for x in _ranges(query_index, blocks[0]))
    first_key, last_key = (x[None, :] for x in _ranges(key_index, blocks[1]))
    visible = first_key <= last_query
    return visible if window is None else visible & (last_key > first_query - window)


def forward(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads head_dim"],
    query_index: Int[Array, " queries"],
    key_index: Int[Array, " keys"],
    query_segments: Int[Array, "batch queries"] | None = None,
    key_segments: Int[Array, "batch keys"] | None = None,
    *,
    window: int | Int[Array, ""] | None = None,
    scale: float,
    softcap: float | None = None,
    blocks: tuple[int, int] = BLOCKS,
) -> Result:
    """Attends to these keys alone.

    Args:
      query: heads ``g * n .. g * n + n - 1`` share key/value head ``g``, with ``n = heads / kv_heads``.
      key: keys.
      value: values.
      query_index: place of each query in its sequence, at least 0; a query sees keys of index ``i - window + 1 .. i``.
      key_index: place of each key.
      query_segments: packed documents; a token sees only its own. Both or neither are given.
      key_segments: of the keys.
      window: sliding window in tokens, itself included; may be traced.
      scale: multiplier on logits.
      softcap: ``softcap * tanh(logit / softcap)`` before the mask.
      blocks: queries and keys at a time.

    Returns:
      The output and the natural logarithm of the sum of the exponentiated logits, both float32. A query that sees none
      of these keys has output 0 and logarithm -inf.
    """
    batch, rows, heads, width = query.shape
    queries, query_block_at = _cut(blocks[0], query_index, _NO_QUERY, _grouped(query, key), query_segments)
    keys, key_block_at = _cut(blocks[1], key_index, _NO_KEY, key, value, key_segments)
    visible = jnp.asarray(visible_blocks(query_index, key_index, window, blocks))
    scores = (batch, key.shape[2], heads // key.shape[2], blocks[0])
    nothing = jnp.zeros((*scores, width)), jnp.full(scores, -jnp.inf), jnp.zeros(scores)
    nothing = _varying_like(nothing, (query, key, value, query_index, key_index, query_segments, key_segments, window))

    def query_block(i):
        q_index, q, q_segments = query_block_at(i)

        def attend(j, carry):
            out, peak, total = carry
            k_index, k, v, k_segments = key_block_at(j)
            visible = _visible(q_index, k_index, q_segments, k_segments, window)
            logits, _ = _logits(q, k, visible, scale, softcap)
            higher = jnp.maximum(peak, logits.max(axis=-1))
            shift = jnp.where(jnp.isneginf(higher), 0.0, higher)  # nothing seen yet: all weights 0, and no NaN
            weights = jnp.exp(logits - shift[..., None])
            decay = jnp.exp(peak - shift)
            out = out * decay[..., None] + _dot("bhgqk,bkhd->bhgqd", weights.astype(v.dtype), v)
            return out, higher, total * decay + weights.sum(axis=-1)

        def key_block(j, carry):
            return jax.lax.cond(visible[i, j], lambda c: attend(j, c), lambda c: c, carry)

        out, peak, total = jax.lax.fori_loop(0, keys, key_block, nothing)
        out = out / jnp.where(total == 0, 1.0, total)[..., None]
        return out.transpose(0, 3, 1, 2, 4), (peak + jnp.log(total)).transpose(0, 3, 1, 2)

    out, lse = (_joined(x) for x in jax.lax.map(query_block, jnp.arange(queries)))
    return out[:, :rows].reshape(query.shape), lse[:, :rows].reshape(query.shape[:-1])


def merge(first: Result, second: Result) -> Result:
    """The result of attending to two disjoint sets of keys, from those of each: exact, associative and commutative."""
    (first_out, first_lse), (second_out, second_lse) = first, second
    lse = jnp.logaddexp(first_lse, second_lse)
    shift = jnp.where(jnp.isneginf(lse), 0.0, lse)
    shares = jnp.exp(first_lse - shift)[..., None], jnp.exp(second_lse - shift)[..., None]
    return shares[0] * first_out + shares[1] * second_out, lse


def backward(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads head_dim"],
    out: Float[Array, "batch queries heads head_dim"],
    lse: Float[Array, "batch queries heads"],
    out_gradient: Float[Array, "batch queries heads head_dim"],
    query_index: Int[Array, " queries"],
    key_index: Int[Array, " keys"],
    query_segments: Int[Array, "batch queries"] | None = None,
    key_segments: Int[Array, "batch keys"] | None = None,
    *,
    window: int | Int[Array, ""] | None = None,
    scale: float,
    softcap: float | None = None,
    blocks: tuple[int, int] = BLOCKS,
) -> tuple[
    Float[Array, "batch queries heads head_dim"],
    Float[Array, "batch keys kv_heads head_dim"],
    Float[Array, "batch keys kv_heads head_dim"],
]:
    """What these keys contribute to the gradient; over disjoint sets of keys the contributions add up.

    Args:
      query, key, value: as in `forward`.
      out: of *all* keys that the queries see, merged.
      lse: likewise, so that probabilities are those of the whole softmax.
      out_gradient: with respect to ``out``.
      query_index, key_index, query_segments, key_segments, window, scale, softcap, blocks: as in `forward`.

    Returns:
      The gradients with respect to query, key and value, float32.
    """
    # The Jacobian of softmax: dS = P * (dP - D) with D = rowsum(dO * O).
    row_sums = jnp.sum(out.astype(jnp.float32) * out_gradient.astype(jnp.float32), axis=-1)
    per_query = (_grouped(x, key) for x in (query, out_gradient.astype(value.dtype), lse, row_sums))
    queries, query_block_at = _cut(blocks[0], query_index, _NO_QUERY, *per_query, query_segments)
    keys, key_block_at = _cut(blocks[1], key_index, _NO_KEY, key, value, key_segments)
    visible = jnp.asarray(visible_blocks(query_index, key_index, window, blocks))
    batch, rows, heads, width = query.shape
    zeros = (
        jnp.zeros((batch, queries * blocks[0], key.shape[2], heads // key.shape[2], width)),
        jnp.zeros((batch, blocks[1], *key.shape[2:])),
    )
    inputs = (query, key, value, out_gradient, lse, query_index, key_index, query_segments, key_segments, window)
    dq_zeros, dkv_zeros = _varying_like(zeros, inputs)

    def key_block(dq, j):
        k_index, k, v, k_segments = key_block_at(j)

        def add(i, sums):
            dq, dk, dv = sums
            q_index, q, dout, lse, row_sums, q_segments = query_block_at(i)
            visible = _visible(q_index, k_index, q_segments, k_segments, window)
            logits, slope = _logits(q, k, visible, scale, softcap)
            weights = jnp.where(visible, jnp.exp(logits - _columns(lse)), 0.0)  # a blind query's lse is -inf
            dweights = _dot("bqhgd,bkhd->bhgqk", dout, v)
            dlogits = (weights * (dweights - _columns(row_sums)) * slope * scale).astype(k.dtype)
            dq = dq + _dot("bhgqk,bkhd->bqhgd", dlogits, k)
            dk = dk + _dot("bhgqk,bqhgd->bkhd", dlogits, q)
            return dq, dk, dv + _dot("bhgqk,bqhgd->bkhd", weights.astype(dout.dtype), dout)

        def query_block(i, carry):
            dq, dk, dv = carry
            # Only a block of dq goes through the branches: the whole would be copied there.
            part = jax.lax.dynamic_slice_in_dim(dq, i * blocks[0], blocks[0], axis=1)
            part, dk, dv = jax.lax.cond(visible[i, j], lambda sums: add(i, sums), lambda sums: sums, (part, dk, dv))
            return jax.lax.dynamic_update_slice_in_dim(dq, part, i * blocks[0], axis=1), dk, dv

        dq, dk, dv = jax.lax.fori_loop(0, queries, query_block, (dq, dkv_zeros, dkv_zeros))
        return dq, (dk, dv)

    dq, dkv = jax.lax.scan(key_block, dq_zeros, jnp.arange(keys))
    dk, dv = (_joined(x)[:, : key.shape[1]] for x in dkv)
    return dq[:, :rows].reshape(query.shape), dk, dv


# Indices of the rows that pad the last block: such a query sees nothing, such a key is seen by nobody.
_NO_QUERY, _NO_KEY = -1, np.iinfo(np.int32).max


def _cut(size: int, index: Any, padding: int, *arrays: Any) -> tuple[int, Callable[[Any], tuple]]:
    """Pads arrays ``[batch, rows, ...]`` to whole blocks; returns their number, and what block ``i`` holds."""
    count = -(-len(index) // size)
    extra = (0, count * size - len(index))
    index = jnp.pad(jnp.asarray(index, jnp.int32), (extra,), constant_values=padding)
    arrays = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), extra, *((0, 0),) * (x.ndim - 2))), arrays)

    def block(i: Any) -> tuple:
        def take(x: jax.Array, axis: int) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=axis)

        return take(index, 0), *jax.tree.map(lambda x: take(x, 1), arrays)

    return count, block


def _ranges(index: Any, size: int) -> tuple[Any, Any]:
    """Least and greatest index in every block."""
    xp = np if isinstance(index, np.ndarray) else jnp
    index = xp.pad(index, (0, -len(index) % size), mode="edge").reshape(-1, size)
    return index.min(axis=1), index.max(axis=1)


def _visible(q_index, k_index, q_segments, k_segments, window):
    """Who sees whom, in a shape that broadcasts against ``[batch, kv_heads, group, queries, keys]``."""
    row, column = q_index[:, None], k_index[None, :]
    visible = column <= row
    if window is not None:
        visible &= column > row - window
    if q_segments is None:
        return visible
    return visible & (q_segments[:, None, None, :, None] == k_segments[:, None, None, None, :])


def _logits(q, k, visible, scale, softcap):
    """Logits, -inf where invisible, and the derivative of soft-capping."""
    logits, slope = _dot("bqhgd,bkhd->bhgqk", q, k) * scale, jnp.float32(1.0)
    if softcap is not None:
        bounded = jnp.tanh(logits / softcap)
        logits, slope = softcap * bounded, 1.0 - jnp.square(bounded)
    return jnp.where(visible, logits, -jnp.inf), slope


def _dot(spec: str, *operands: jax.Array) -> jax.Array:
    return jnp.einsum(spec, *operands, preferred_element_type=jnp.float32)


def _grouped(x: jax.Array, key: jax.Array) -> jax.Array:
    """``[batch, rows, heads, ...]`` as ``[batch, rows, kv_heads, group, ...]``."""
    return x.reshape(*x.shape[:2], key.shape[2], -1, *x.shape[3:])


def _columns(x: jax.Array) -> jax.Array:
    """``[batch, queries, kv_heads, group]`` to stand against scores."""
    return x.transpose(0, 2, 3, 1)[..., None]


def _joined(blocks: jax.Array) -> jax.Array:
    """``[blocks, batch, rows, ...]`` as ``[batch, blocks * rows, ...]``."""
    count, batch, rows = blocks.shape[:3]
    return jnp.moveaxis(blocks, 0, 1).reshape(batch, count * rows, *blocks.shape[3:])


def _varying_like(zeros: Any, inputs: Any) -> Any:
    """Within a `shard_map` a loop must begin with values that differ over the axes over which its results will."""
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(inputs)))
    return jax.tree.map(lambda x: jax.lax.pcast(x, tuple(axes), to="varying"), zeros) if axes else zeros
