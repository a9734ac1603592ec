"""How the keys and values of one head are got out of pages that hold all heads of a token side by side.

A page in device memory is ``[page_size, kv_heads, head_dim]`` with the last two axes in tiles: the heads of a token are
neighbouring sublanes, and types of less than 32 bits share a 32-bit word between neighbouring heads. Slicing a head as
an array would shuffle sublanes row by row. Instead whole words are read with a stride, which the load unit does at no
cost, and the head's bits are shifted out of them. Where heads do not fill words or tiles, XLA itself lays the heads of a
page out one after the other; then a head is a plain block (`interleaved` says which it is).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


def words(dtype: Any) -> int:
    """Values of a type in 32 bits."""
    return 4 // jnp.dtype(dtype).itemsize


def interleaved(kv_heads: int, dtype: Any) -> bool:
    """Whether XLA lays out ``[.., page_size, kv_heads, head_dim]`` with the heads of a token together."""
    return kv_heads % words(dtype) == 0 and (kv_heads in (1, 2, 4) or kv_heads % 8 == 0)


def unpack(block: Any, to: Any, kv_heads: int) -> None:
    """Writes a block of tokens head by head.

    Args:
      block: ref ``[tokens, kv_heads, head_dim]``, heads interleaved.
      to: ref ``[kv_heads, tokens, head_dim]``, bfloat16 or float32.
      kv_heads: of both.
    """
    tokens, _, width = block.shape
    together = words(block.dtype)
    stride = kv_heads // together
    flat = block if together == 1 else block.bitcast(jnp.int32)
    flat = flat.reshape(tokens * stride, width)
    for i in range(stride):
        some = flat[...] if stride == 1 else flat[pl.ds(i, tokens, stride=stride), :]
        for j in range(together):
            to[i * together + j] = _value(some, j, block.dtype).astype(to.dtype)


def _value(word: jax.Array, j: int, dtype: Any) -> jax.Array:
    """The ``j``-th value of every word, counted from the low bits, in float32."""
    dtype = jnp.dtype(dtype)
    if dtype.itemsize == 4:
        return word
    if dtype == jnp.bfloat16:
        return pltpu.bitcast(word << 16 if j == 0 else word & jnp.int32(-65536), jnp.float32)
    byte = word << (24 - 8 * j)
    if dtype == jnp.int8:
        return (byte >> 24).astype(jnp.float32)
    return _float8_e4m3fn(byte)


def _float8_e4m3fn(byte: jax.Array) -> jax.Array:
    """A number in the high byte; NaN, which no finite number is rounded to, becomes 480."""
    sign = byte & jnp.int32(-(2**31))
    magnitude = (byte >> 24) & 0x7F
    normal = pltpu.bitcast(((magnitude << 20) + (120 << 23)) | sign, jnp.float32)
    # Below 2**-6 the exponent is 0 and what is left counts 2**-9ths.
    small = magnitude.astype(jnp.float32) * 2.0**-9
    return jnp.where(magnitude < 8, jnp.where(sign < 0, -small, small), normal)
