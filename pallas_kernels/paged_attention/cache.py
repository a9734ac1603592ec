"""The paged cache of keys and values, and how new ones are stored in it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

# Types in which keys and values are kept beside their scales, and the largest magnitude that each can hold.
QUANTIZED = {"int8": 127.0, "float8_e4m3fn": 448.0}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("key", "value", "key_scale", "value_scale"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class PagedCache:
    """Keys and values of all layers in pages of equally many tokens; a block table says which pages a sequence has.

    A quantized cache keeps one scale per token and head: what is meant is ``key * key_scale``. Tokens lie innermost in
    the scales, so that a page's scales of a head are one run.

    Attributes:
      key: rotated keys; float32, bfloat16, float16, int8 or float8_e4m3fn.
      value: values, of the same type.
      key_scale: of a quantized cache, else ``None``.
      value_scale: likewise.
    """

    key: Num[Array, "layers pages page_size kv_heads head_dim"]
    value: Num[Array, "layers pages page_size kv_heads head_dim"]
    key_scale: Float[Array, "layers pages kv_heads page_size"] | None = None
    value_scale: Float[Array, "layers pages kv_heads page_size"] | None = None

    @classmethod
    def zeros(cls, layers: int, pages: int, page_size: int, kv_heads: int, head_dim: int, dtype: Any) -> "PagedCache":
        """An empty cache; ``dtype`` int8 or float8_e4m3fn makes a quantized one."""
        shape = (layers, pages, page_size, kv_heads, head_dim)
        key, value = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
        if key.dtype.name not in QUANTIZED:
            return cls(key, value)
        scales = (layers, pages, kv_heads, page_size)
        return cls(key, value, jnp.zeros(scales, jnp.float32), jnp.zeros(scales, jnp.float32))

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return self.key.shape[2]

    @property
    def quantized(self) -> bool:
        """Whether keys and values are stored beside scales."""
        return self.key_scale is not None


def quantize(
    x: Float[Array, "*rows head_dim"], dtype: Any
) -> tuple[Num[Array, "*rows head_dim"], Float[Array, "*rows"]]:
    """Rounds each row to ``dtype`` (a key of `QUANTIZED`) by its own scale; returns the rounded rows and the scales."""
    dtype = jnp.dtype(dtype)
    x = x.astype(jnp.float32)
    largest = QUANTIZED[dtype.name]
    scale = jnp.max(jnp.abs(x), axis=-1) / largest
    x = x / jnp.where(scale == 0, 1.0, scale)[..., None]
    x = jnp.clip(jnp.round(x) if dtype == jnp.int8 else x, -largest, largest)
    return x.astype(dtype), scale


def slots(
    block_table: Int[Array, "sequences pages_per_sequence"],
    sequence: Int[Array, " tokens"],
    position: Int[Array, " tokens"],
    page_size: int,
) -> Int[Array, " tokens"]:
    """Where tokens are stored, as `write` wants it: ``page * page_size + offset``; -1 for a token that has no place.

    Args:
      block_table: the pages of every sequence.
      sequence: whose token it is; negative: nobody's (padding).
      position: of the token in its sequence; one outside of the block table has no place.
      page_size: tokens in a page.
    """
    inside = (sequence >= 0) & (position >= 0) & (position < block_table.shape[1] * page_size)
    page = jnp.asarray(block_table)[jnp.where(inside, sequence, 0), jnp.where(inside, position, 0) // page_size]
    return jnp.where(inside, page * page_size + position % page_size, -1)


def write(
    cache: PagedCache,
    layer: int | Int[Array, ""],
    key: Float[Array, "tokens kv_heads head_dim"],
    value: Float[Array, "tokens kv_heads head_dim"],
    slot: Int[Array, " tokens"],
) -> PagedCache:
    """Stores new keys and values of one layer: in place where the cache is donated or carried through a loop.

    Args:
      cache: the cache.
      layer: its number, may be traced.
      key: rotated; quantized here if the cache is.
      value: values.
      slot: see `slots`; those of different tokens differ, a negative one is not stored.
    """
    pages, page_size = cache.key.shape[1:3]
    page = jnp.where(slot < 0, pages, slot // page_size)  # an index past the end is dropped; -1 would mean the last
    offset = slot % page_size

    def store(to: jax.Array, new: jax.Array) -> jax.Array:
        return to.at[layer, page, offset].set(new.astype(to.dtype), mode="drop", unique_indices=True)

    if cache.key_scale is None or cache.value_scale is None:
        return PagedCache(store(cache.key, key), store(cache.value, value))

    def scales(to: jax.Array, new: jax.Array) -> jax.Array:
        return to.at[layer, page, :, offset].set(new, mode="drop", unique_indices=True)

    (key, key_scale), (value, value_scale) = (quantize(x, cache.key.dtype) for x in (key, value))
    return PagedCache(
        store(cache.key, key),
        store(cache.value, value),
        scales(cache.key_scale, key_scale),
        scales(cache.value_scale, value_scale),
    )
