"""Attention through cuDNN's fused kernels, by way of `jax.nn.dot_product_attention`."""

import jax
import jax.numpy as jnp


def why_not(query, window, softcap) -> str | None:
    """What of this case cuDNN's fused attention does not take; ``None``: it takes it."""
    head_dim = query.shape[-1]
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"query is {query.dtype}; cuDNN takes bfloat16 and float16"
    if softcap is not None:
        return f"softcap={softcap}; cuDNN bounds no logits"
    if not (window is None or isinstance(window, int)):
        return "window is traced; cuDNN wants it static"
    if head_dim > 128 or head_dim % 8:
        return f"head_dim={head_dim}; cuDNN takes multiples of 8 up to 128"
    return None


def flash_attention(query, key, value, *, segment_ids, causal, window, scale, softcap):
    """See `pallas_kernels.flash_attention.flash_attention`."""
    del softcap
    mask = None
    if segment_ids is not None:
        mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask,
        is_causal=causal,
        scale=scale,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
