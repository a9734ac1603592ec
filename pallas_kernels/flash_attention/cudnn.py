"""Attention through cuDNN's fused kernels, by way of `jax.nn.dot_product_attention`."""

import jax
import jax.numpy as jnp


def supports(query, window, softcap) -> bool:
    """Whether cuDNN's fused attention takes this case: 16 bits, static window, no soft-cap, heads up to 128."""
    return (
        query.dtype in (jnp.bfloat16, jnp.float16)
        and softcap is None
        and (window is None or isinstance(window, int))
        and query.shape[-1] <= 128
        and query.shape[-1] % 8 == 0
    )


def flash_attention(query, key, value, *, segment_ids, window, scale, softcap):
    """See `pallas_kernels.flash_attention.flash_attention`."""
    if not supports(query, window, softcap):
        raise ValueError("cudnn attention needs bfloat16/float16, a static window, no softcap, and head_dim <= 128")
    mask = None
    if segment_ids is not None:
        mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask,
        is_causal=True,
        scale=scale,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
