"""Attention through JAX's splash kernels for TPUs; elsewhere the same kernels run in Pallas's interpreter, slowly."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from pallas_kernels.platform import platform

# Queries and keys held in VMEM at a time, and keys multiplied at a time (KERNELS: 1024-2048 and 512 suit v5e and v6e).
_BLOCK, _COMPUTE = 1024, 512


def why_not(query, window, softcap) -> str | None:
    """What of this case the kernels do not take; ``None``: they take it."""
    del softcap  # any
    _, length, _, head_dim = query.shape
    if length % 128:
        return f"query has length {length}; splash attention takes whole 128s"
    if head_dim % 64:
        return f"head_dim={head_dim}; splash attention takes whole 64s"
    if query.dtype not in (jnp.bfloat16, jnp.float32):
        return f"query is {query.dtype}; splash attention takes bfloat16 and float32"
    if not (window is None or isinstance(window, int)):
        return "window is traced; splash attention wants it static"
    return None


def flash_attention(query, key, value, *, segment_ids, causal, window, scale, softcap):
    """See `pallas_kernels.flash_attention.flash_attention`."""
    _, length, heads, _ = query.shape
    mask: masks.Mask = masks.CausalMask((length, length)) if causal else masks.FullMask((length, length))
    if window is not None and window < length:
        mask = masks.LocalMask((length, length), (window - 1, 0), 0)
    attend = kernel.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=_blocks(length),
        attn_logits_soft_cap=softcap,
        head_shards=1,
        q_seq_shards=1,
        interpret=platform() != "tpu",
    )
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in ((query * scale).astype(query.dtype), key, value))
    segments = None if segment_ids is None else kernel.SegmentIds(segment_ids, segment_ids)
    out = jax.vmap(attend, in_axes=(0, 0, 0, None if segments is None else 0))(q, k, v, segments)
    return jnp.swapaxes(out, 1, 2)


@functools.cache
def _blocks(length: int) -> kernel.BlockSizes:
    block = max(size for size in (128, 256, 512, 1024) if length % size == 0 and size <= _BLOCK)
    compute = min(block, _COMPUTE)
    return kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=compute,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=compute,
        block_q_dq=block,
        block_kv_dq=block,
    )
