"""Blocked attention in plain XLA operations: the path for CPU, and for any platform without a kernel of its own.

Queries are cut into static blocks. A block is multiplied only with the keys that causality and a static window leave
visible, so about half of the quadratic work is never done, and its scores are recomputed in the backward pass rather
than kept, so that memory grows with ``block * length``, not ``length ** 2``.
"""

import functools

import jax
import jax.numpy as jnp

# Rows of queries whose scores against a few thousand keys stay in a core's cache.
BLOCK = 128
# Beyond this many blocks the unrolled program grows long; larger blocks take over.
MAX_BLOCKS = 32


def flash_attention(query, key, value, *, segment_ids, window, scale, softcap):
    """See `pallas_kernels.flash_attention.flash_attention`."""
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    block = max(BLOCK, -(-length // MAX_BLOCKS))
    q = query.reshape(batch, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    k, v = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    outputs: list[jax.Array] = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        first = max(0, start - window + 1) if isinstance(window, int) else 0
        attend = functools.partial(_attend_block, start=start, first=first, scale=scale, softcap=softcap)
        segments = None
        if segment_ids is not None:
            segments = (segment_ids[:, start:stop], segment_ids[:, first:stop])
        block_inputs = (q[:, :, :, start:stop], k[:, :, first:stop], v[:, :, first:stop])
        if outputs:
            # One block after the other, backward too: a scheduler that is free to would keep the scores of all at once
            # (and JAX 0.10's compiler for CPUs still does).
            outputs[-1], block_inputs = jax.lax.optimization_barrier((outputs[-1], block_inputs))
        outputs.append(jax.checkpoint(attend)(*block_inputs, segments, window))
    out = jnp.concatenate(outputs, axis=3)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)


def _attend_block(q, k, v, segments, window, *, start, first, scale, softcap):
    """Queries ``[b, kv, group, rows, d]`` from index ``start`` against keys ``[b, kv, columns, d]`` from ``first``."""
    logits = jnp.einsum("bhgqd,bhkd->bhgqk", q, k, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    row = start + jnp.arange(q.shape[3])[:, None]
    column = first + jnp.arange(k.shape[2])[None, :]
    visible = column <= row
    if window is not None:
        visible &= column > row - window
    if segments is not None:
        visible = visible & (segments[0][:, None, None, :, None] == segments[1][:, None, None, None, :])
    logits = jnp.where(visible, logits, -1e30)  # every row sees at least itself
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.einsum("bhgqk,bhkd->bhgqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (out / total).astype(v.dtype)
