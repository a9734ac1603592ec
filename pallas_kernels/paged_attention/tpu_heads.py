"""How the keys and values of one head are got out of pages that hold all heads of a token side by side.

A page in device memory is ``[page_size, kv_heads, head_dim]`` with the last two axes in tiles: the heads of a token are
neighbouring sublanes, and types of less than 32 bits share a 32-bit word between neighbouring heads. Slicing a head as
an array would shuffle sublanes row by row. Instead whole words are read with a stride, which the load unit does at no
cost, and the head's bits are shifted out of them. Where heads do not fill words or tiles, XLA itself lays the heads of
a page out one after the other; then a head is a plain block (`interleaved` says which it is).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_LANES = 128
# A stretch of code unpacks about so many values, at least so many tokens: more are longer to compile than to run.
_PIECE, _LEAST = 2**17, 32


def words(dtype: Any) -> int:
    """Values of a type in 32 bits."""
    return 4 // jnp.dtype(dtype).itemsize


def interleaved(kv_heads: int, dtype: Any) -> bool:
    """Whether XLA lays out ``[.., page_size, kv_heads, head_dim]`` with the heads of a token together."""
    return kv_heads % words(dtype) == 0 and (kv_heads in (1, 2, 4) or kv_heads % 8 == 0)


def unpack(block: Any, to: Any, spread: Any | None) -> None:
    """Writes a block of tokens head by head.

    Args:
      block: ref ``[tokens, kv_heads, head_dim]``, heads interleaved.
      to: ref ``[kv_heads, tokens, head_dim]``, bfloat16 or float32.
      spread: see `heads_of`.
    """
    tokens, kv_heads, width = block.shape
    piece = tokens
    while piece > _LEAST and piece * kv_heads * width > _PIECE:
        piece //= 2

    def unpack_piece(begin: Any) -> int:
        rows = pl.ds(pl.multiple_of(begin, piece), piece)
        for h, x in enumerate(heads_of(block.at[rows], to.dtype, spread)):
            to[h, rows] = x
        return 0

    if piece == tokens:
        unpack_piece(0)
    else:
        jax.lax.fori_loop(0, tokens // piece, lambda i, _: unpack_piece(i * piece), 0)


def heads_of(block: Any, dtype: Any, spread: Any | None) -> list[jax.Array]:
    """The heads ``[tokens, head_dim]`` of a block of tokens, in ``dtype``.

    Args:
      block: ref ``[tokens, kv_heads, head_dim]``, heads interleaved.
      dtype: bfloat16 or float32.
      spread: ref ``[at least tokens * kv_heads / words, 128]`` int32, needed where `spreads` says so.
    """
    tokens, kv_heads, width = block.shape
    together = words(block.dtype)
    stride = kv_heads // together
    flat = block.bitcast(jnp.int32).reshape(tokens * stride, width)
    parts: list[list[jax.Array]] = [[] for _ in range(kv_heads)]
    for lane in range(0, width, _LANES):
        lanes = min(width - lane, _LANES)
        if spread is not None:
            spread[: tokens * stride, :lanes] = flat[:, lane : lane + lanes]
        for i in range(stride):
            if spread is not None:
                some = spread[pl.ds(i, tokens, stride=stride), :][:, :lanes]
            elif stride == 1:
                some = flat[:, lane : lane + lanes]
            else:
                some = flat[pl.ds(i, tokens, stride=stride), :]
            for j in range(together):
                parts[i * together + j].append(_value(some, j, block.dtype).astype(dtype))
    return [x[0] if len(x) == 1 else jnp.concatenate(x, axis=1) for x in parts]


def spreads(kv_heads: int, head_dim: int, dtype: Any) -> bool:
    """Whether words are first copied to rows of 128, which alone can be read with a stride."""
    return kv_heads > words(dtype) and head_dim != _LANES


def _value(word: jax.Array, j: int, dtype: Any) -> jax.Array:
    """The ``j``-th value of every word, counted from the low bits, in float32."""
    dtype = jnp.dtype(dtype)
    if dtype.itemsize == 4:
        return pltpu.bitcast(word, jnp.float32)
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
