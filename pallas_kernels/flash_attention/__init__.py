"""Attention for training and prefill: exact, memory linear in the sequence length."""

import functools
from typing import Literal

from jaxtyping import Array, Float, Int

from pallas_kernels.flash_attention import cudnn, reference, splash, xla
from pallas_kernels.platform import platform
from pallas_kernels.sharded import on_shards

Implementation = Literal["auto", "xla", "cudnn", "splash", "reference"]

_IMPLEMENTATIONS = {
    "xla": xla.flash_attention,
    "cudnn": cudnn.flash_attention,
    "splash": splash.flash_attention,
    "reference": reference.flash_attention,
}
# Opaque to the partitioner, so each device is given its own part.
_OPAQUE = ("cudnn", "splash")


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
      implementation: ``xla`` (blocked, any platform), ``cudnn`` (NVIDIA, 16-bit types), ``splash`` (TPU), ``reference``
        (float32, quadratic memory), or ``auto``: the kernel of the platform that the program is for
        (`pallas_kernels.platform`) if it supports the case, else XLA.

    Raises:
      ValueError: unknown implementation, a case that it does not support, or shapes that do not fit together.
    """
    if query.shape[2] % key.shape[2] or key.shape != value.shape or query.shape[1] != key.shape[1]:
        raise ValueError(f"shapes do not fit: query {query.shape}, key {key.shape}, value {value.shape}")
    if implementation == "auto":
        implementation = _kernel_for(platform(), query, window, softcap)
    if implementation not in _IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}; choose auto, {', '.join(_IMPLEMENTATIONS)}")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    function = functools.partial(_IMPLEMENTATIONS[implementation], window=window, scale=scale, softcap=softcap)
    if implementation not in _OPAQUE:
        return function(query, key, value, segment_ids=segment_ids)
    return on_shards(
        lambda q, k, v, segments: function(q, k, v, segment_ids=segments), (query, key, value, segment_ids), query
    )


def _kernel_for(platform: str, query, window, softcap) -> Implementation:
    if platform == "gpu" and cudnn.supports(query, window, softcap):
        return "cudnn"
    if platform == "tpu" and splash.supports(query, window):
        return "splash"
    return "xla"


__all__ = ["Implementation", "flash_attention"]
