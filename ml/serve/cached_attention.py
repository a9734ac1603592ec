"""Attention over a key/value cache, as two strategies: one fills the cache with prompts, the other extends it."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ml.models import AttentionLayer, TransformerConfig
from pallas_kernels.flash_attention import Implementation, flash_attention


@flax.struct.dataclass
class KVCache:
    """Keys (rotated) and values of every layer: one array per kind, carried through the layer loop, updated in place.

    Here a sequence owns one page, so that page ``b`` is row ``b`` of the batch.
    """

    key: Float[Array, "layers pages page_size kv_heads head_dim"]
    value: Float[Array, "layers pages page_size kv_heads head_dim"]

    @classmethod
    def zeros(cls, config: TransformerConfig, pages: int, page_size: int, dtype: Any) -> "KVCache":
        """An empty cache; ``dtype`` is that of the activations."""
        shape = (config.num_layers, pages, page_size, config.num_kv_heads, config.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


@flax.struct.dataclass
class PrefillAttention:
    """Causal attention within each row, which starts at position 0, and stores the keys and values on the way.

    Rows may be padded on the right: no real token sees the padding, and what the padding leaves in the cache is
    overwritten by `DecodeAttention` before it comes into sight.

    Attributes:
      implementation: see `pallas_kernels.flash_attention`.
    """

    implementation: Implementation = flax.struct.field(pytree_node=False, default="auto")

    def attend(
        self, layer: AttentionLayer, query: jax.Array, key: jax.Array, value: jax.Array, state: KVCache
    ) -> tuple[jax.Array, KVCache]:
        """See `ml.models.AttentionStrategy.attend`; the rows' length is at most the page size."""
        corner = (layer.index, 0, 0, 0, 0)
        state = KVCache(
            jax.lax.dynamic_update_slice(state.key, key[None].astype(state.key.dtype), corner),
            jax.lax.dynamic_update_slice(state.value, value[None].astype(state.value.dtype), corner),
        )
        out = flash_attention(
            query,
            key,
            value,
            window=layer.window,
            scale=layer.scale,
            softcap=layer.softcap,
            implementation=self.implementation,
        )
        return out, state


@flax.struct.dataclass
class DecodeAttention:
    """Stores the keys and values of new tokens, then attends to everything that their row's page holds up to them.

    Attributes:
      positions: where in its row each new token stands; those of one row differ. A token beyond the page is not stored.
    """

    positions: Int[Array, "batch length"]

    def attend(
        self, layer: AttentionLayer, query: jax.Array, key: jax.Array, value: jax.Array, state: KVCache
    ) -> tuple[jax.Array, KVCache]:
        """See `ml.models.AttentionStrategy.attend`."""
        rows = jnp.arange(query.shape[0])[:, None]

        def store(cache: jax.Array, new: jax.Array) -> jax.Array:
            where = cache.at[layer.index, rows, self.positions]
            return where.set(new.astype(cache.dtype), mode="drop", unique_indices=True)

        state = KVCache(store(state.key, key), store(state.value, value))
        keys = jax.lax.dynamic_index_in_dim(state.key, layer.index, keepdims=False)
        values = jax.lax.dynamic_index_in_dim(state.value, layer.index, keepdims=False)
        return _attend(query, keys, values, self.positions, layer), state


def _attend(
    query: Float[Array, "batch length heads head_dim"],
    keys: Float[Array, "batch page_size kv_heads head_dim"],
    values: Float[Array, "batch page_size kv_heads head_dim"],
    positions: Int[Array, "batch length"],
    layer: AttentionLayer,
) -> Float[Array, "batch length heads head_dim"]:
    """Grouped-query attention of a few queries with whole pages; softmax in float32."""
    batch, length, heads, head_dim = query.shape
    grouped = query.reshape(batch, length, keys.shape[2], heads // keys.shape[2], head_dim)
    logits = jnp.einsum("blhgd,bkhd->bhglk", grouped, keys, preferred_element_type=jnp.float32) * layer.scale
    if layer.softcap is not None:
        logits = layer.softcap * jnp.tanh(logits / layer.softcap)
    here, there = positions[:, :, None], jnp.arange(keys.shape[1])
    visible = there <= here
    if layer.window is not None:
        visible &= there > here - layer.window
    logits = jnp.where(visible[:, None, None], logits, -1e30)  # a token sees at least itself
    weights = jax.nn.softmax(logits, axis=-1).astype(values.dtype)
    out = jnp.einsum("bhglk,bkhd->blhgd", weights, values, preferred_element_type=jnp.float32)
    return out.reshape(query.shape).astype(query.dtype)
