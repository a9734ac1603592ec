"""Attention as the formula says it, in float32 with the whole score matrix: the oracle for all implementations."""

import jax
import jax.numpy as jnp


def flash_attention(query, key, value, *, segment_ids, window, scale, softcap):
    """See `pallas_kernels.flash_attention.flash_attention`."""
    length, groups = query.shape[1], query.shape[2] // key.shape[2]
    q, k, v = (x.astype(jnp.float32) for x in (query, jnp.repeat(key, groups, 2), jnp.repeat(value, groups, 2)))
    logits = scale * jnp.einsum("bqhd,bkhd->bhqk", q, k, precision="highest")
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    row, column = jnp.arange(length)[:, None], jnp.arange(length)[None, :]
    visible = column <= row
    if window is not None:
        visible &= column > row - window
    if segment_ids is not None:
        visible = visible & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    weights = jax.nn.softmax(jnp.where(visible, logits, -jnp.inf), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v, precision="highest").astype(query.dtype)
