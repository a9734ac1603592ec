"""Attention for training and prefill: exact, memory linear in the sequence length."""

from typing import Literal

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.flash_attention import cudnn, reference, xla

Implementation = Literal["auto", "xla", "cudnn", "reference"]

_IMPLEMENTATIONS = {
    "xla": xla.flash_attention,
    "cudnn": cudnn.flash_attention,
    "reference": reference.flash_attention,
}


def flash_attention(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
    *,
    segment_ids: Int[Array, "batch length"] | None = None,
    window: int | Int[Array, ""] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "batch length heads head_dim"]:
    """Causal grouped-query attention: ``softmax(scale * q k^T) v`` over the keys that a query may see.

    A query at index ``i`` sees keys ``max(0, i - window + 1) .. i`` of its own segment.

    Args:
      query: heads ``g * n .. g * n + n - 1`` share key/value head ``g``, with ``n = heads / kv_heads``.
      key: keys.
      value: values.
      segment_ids: packed documents; a token sees only its own segment. ``None``: one segment.
      window: sliding window in tokens, itself included; may be traced (then no work is skipped).
      scale: multiplier on logits; ``None``: ``head_dim ** -0.5``.
      softcap: ``softcap * tanh(logit / softcap)`` before the mask.
      implementation: ``xla`` (blocked, any platform), ``cudnn`` (NVIDIA, 16-bit types), ``reference`` (float32,
        quadratic memory), or ``auto``: cuDNN where the default backend is a GPU and the case is one it supports,
        else XLA. When compiling for a machine other than this one, name the implementation.

    Raises:
      ValueError: unknown implementation, or shapes that do not fit together.
    """
    if query.shape[2] % key.shape[2] or key.shape != value.shape or query.shape[1] != key.shape[1]:
        raise ValueError(f"shapes do not fit: query {query.shape}, key {key.shape}, value {value.shape}")
    if implementation == "auto":
        on_gpu = jax.default_backend() == "gpu"
        implementation = "cudnn" if on_gpu and cudnn.supports(query, window, softcap) else "xla"
    if implementation not in _IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}; choose auto, {', '.join(_IMPLEMENTATIONS)}")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    function = _IMPLEMENTATIONS[implementation]
    return function(query, key, value, segment_ids=segment_ids, window=window, scale=scale, softcap=softcap)


__all__ = ["Implementation", "flash_attention"]
