"""The seam between a model and a way to attend: what a strategy receives, and the strategy for training."""

from typing import Any, Protocol

import flax.struct
import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.flash_attention import Implementation, flash_attention


@flax.struct.dataclass
class AttentionLayer:
    """What a strategy must know of the layer it serves.

    Attributes:
      index: 0-based layer number; traced, since layers are scanned.
      window: sliding window in tokens, itself included; ``None``: all; traced where it differs between layers.
      scale: multiplier on logits.
      softcap: bound on logits, or ``None``.
    """

    index: int | Int[Array, ""]
    window: int | Int[Array, ""] | None
    scale: float = flax.struct.field(pytree_node=False)
    softcap: float | None = flax.struct.field(pytree_node=False)


class AttentionStrategy(Protocol):
    """A way to attend: a pytree, so that its arrays (masks, block tables) are arguments of the compiled step."""

    def attend(
        self,
        layer: AttentionLayer,
        query: Float[Array, "batch length heads head_dim"],
        key: Float[Array, "batch length kv_heads head_dim"],
        value: Float[Array, "batch length kv_heads head_dim"],
        state: Any,
    ) -> tuple[Float[Array, "batch length heads head_dim"], Any]:
        """Attends with rotated queries and keys; ``state`` (a KV cache, or nothing) is carried from layer to layer."""
        ...


@flax.struct.dataclass
class SelfAttention:
    """Attention within a batch of packed sequences: training, evaluation and prefill without a cache.

    Attributes:
      segment_ids: documents packed in a row; ``None``: each row is one document.
      implementation: see `pallas_kernels.flash_attention`.
      causal: a token sees what came before it in its document; otherwise (an encoder) all of its document.
    """

    segment_ids: Int[Array, "batch length"] | None = None
    implementation: Implementation = flax.struct.field(pytree_node=False, default="auto")
    causal: bool = flax.struct.field(pytree_node=False, default=True)

    def attend(
        self, layer: AttentionLayer, query: jax.Array, key: jax.Array, value: jax.Array, state: Any
    ) -> tuple[jax.Array, Any]:
        """See `AttentionStrategy.attend`; ``state`` passes through."""
        out = flash_attention(
            query,
            key,
            value,
            segment_ids=self.segment_ids,
            causal=self.causal,
            window=layer.window,
            scale=layer.scale,
            softcap=layer.softcap,
            implementation=self.implementation,
        )
        return out, state
