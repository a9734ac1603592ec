"""Attention as the formula says it, in float32 with the whole score matrix: the oracle for all implementations."""

import jax
import jax.numpy as jnp


def flash_attention(query, key, value, intervals, *, scale, softcap):
    """See `pallas_kernels.flash_attention.backend.Backend.forward`; differentiable as it stands."""
    group = query.shape[2] // key.shape[2]
    q, k, v = (x.astype(jnp.float32) for x in (query, jnp.repeat(key, group, 2), jnp.repeat(value, group, 2)))
    logits = scale * jnp.einsum("bqhd,bkhd->bhqk", q, k, precision="highest")
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    column, (start, stop) = jnp.arange(key.shape[1]), (intervals[:, None, :, i, None] for i in range(2))
    visible = (start <= column) & (column < stop)
    hidden = jnp.where(visible, logits, -1e30)
    peak = jax.lax.stop_gradient(jnp.max(hidden, axis=-1, keepdims=True, initial=-1e30))
    weights = jnp.where(visible, jnp.exp(jnp.where(visible, logits - peak, 0.0)), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    sees = total > 0
    weights = weights / jnp.where(sees, total, 1.0)
    lse = jnp.where(sees, peak + jnp.log(jnp.where(sees, total, 1.0)), -jnp.inf)[..., 0]
    out = jnp.einsum("bhqk,bkhd->bqhd", weights, v, precision="highest")
    return out.astype(query.dtype), lse.transpose(0, 2, 1)
