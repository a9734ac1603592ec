"""Refuses operands that do not fit together, each with the name of the argument and what would be allowed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

from pallas_kernels.paged_attention.cache import QUANTIZED, PagedCache

_FLOATS = ("float32", "bfloat16", "float16")


def check_operands(
    query: Any, cache: PagedCache, block_table: Any, lengths: Any, query_starts: Any, starts: Any
) -> None:
    """Raises a `ValueError` for ranks, sizes or types that no implementation takes."""
    if query.ndim != 3:
        raise ValueError(f"query has shape {query.shape}; it must be [tokens, heads, head_dim]")
    if cache.key.ndim != 5:
        raise ValueError(
            f"cache.key has shape {cache.key.shape}; it must be [layers, pages, page_size, kv_heads, head_dim]"
        )
    if cache.value.shape != cache.key.shape or cache.value.dtype != cache.key.dtype:
        raise ValueError(f"cache.value is {_text(cache.value)}; it must be as cache.key, {_text(cache.key)}")
    layers, pages, page_size, kv_heads, head_dim = cache.key.shape
    if query.shape[2] != head_dim:
        raise ValueError(f"query has head_dim {query.shape[2]}, the cache {head_dim}; they must be equal")
    if query.shape[1] % kv_heads:
        raise ValueError(f"query has {query.shape[1]} heads; it must be a multiple of the cache's {kv_heads} kv_heads")
    if query.dtype.name not in _FLOATS:
        raise ValueError(f"query has dtype {query.dtype.name}; allowed are {', '.join(_FLOATS)}")
    if cache.key.dtype.name not in (*_FLOATS, *QUANTIZED):
        raise ValueError(f"cache.key has dtype {cache.key.dtype.name}; allowed are {', '.join((*_FLOATS, *QUANTIZED))}")
    for name, scale in (("key_scale", cache.key_scale), ("value_scale", cache.value_scale)):
        if (scale is not None) != (cache.key.dtype.name in QUANTIZED):
            raise ValueError(f"cache.{name} must be given for {' and '.join(QUANTIZED)} caches, and for no other")
        if scale is not None and scale.shape != (layers, pages, kv_heads, page_size):
            raise ValueError(
                f"cache.{name} has shape {scale.shape}; it must be [layers, pages, kv_heads, page_size], "
                f"here {(layers, pages, kv_heads, page_size)}"
            )
    if block_table.ndim != 2:
        raise ValueError(f"block_table has shape {block_table.shape}; it must be [sequences, pages_per_sequence]")
    sequences = block_table.shape[0]
    for name, x, size in (("lengths", lengths, sequences), ("starts", starts, sequences)):
        if x is not None and x.shape != (size,):
            raise ValueError(f"{name} has shape {x.shape}; it must be ({size},), one number per row of block_table")
    if query_starts is None and query.shape[0] != sequences:
        raise ValueError(
            f"query has {query.shape[0]} rows for {sequences} sequences; without query_starts there is one row for each"
        )
    if query_starts is not None and query_starts.shape != (sequences + 1,):
        raise ValueError(f"query_starts has shape {query_starts.shape}; it must be ({sequences + 1},)")
    for name, x in (
        ("block_table", block_table),
        ("lengths", lengths),
        ("query_starts", query_starts),
        ("starts", starts),
    ):
        if x is not None and x.dtype != jnp.int32:
            raise ValueError(f"{name} has dtype {x.dtype.name}; it must be int32")


def check_tables(
    cache: PagedCache, block_table: Any, lengths: Any, query_starts: Any, starts: Any, *, traced: bool
) -> None:
    """Refuses numbers that would make a kernel read beyond the cache.

    At once where the arrays are concrete; ``traced``: within a traced function too, for
    `jax.experimental.checkify.checkify`. Not by default: a function that may fail has an effect, and JAX dispatches one
    with effects on its slow path. Entries of a block table beyond a sequence's length are never read.

    Raises:
      ValueError: naming the argument and the first offender.
    """
    xp: Any = jnp if any(isinstance(x, jax.core.Tracer) for x in (block_table, lengths, query_starts, starts)) else np
    if xp is jnp and not traced:
        return
    pages, page_size = cache.key.shape[1:3]
    width = block_table.shape[1]
    lengths = xp.asarray(lengths)
    used = xp.arange(width)[None, :] * page_size < lengths[:, None]
    table = xp.asarray(block_table)
    wrong = [
        (
            (lengths < 0) | (lengths > width * page_size),
            f"lengths must lie in 0 .. {width * page_size}, the tokens of a row of block_table",
        ),
        (used & ((table < 0) | (table >= pages)), f"block_table must hold pages 0 .. {pages - 1} up to a row's length"),
    ]
    if starts is not None:
        starts = xp.asarray(starts)
        wrong.append(
            ((starts < 0) | (starts % page_size != 0), f"starts must be multiples of the page size {page_size}")
        )
    if query_starts is not None:
        count = xp.diff(xp.asarray(query_starts))
        wrong.append(((count < 0) | (count > lengths), "query_starts must rise by 0 .. lengths[s] for each sequence s"))
    for bad, message in wrong:
        if xp is jnp:
            checkify.debug_check(~bad.any(), message)
        elif bad.any():
            raise ValueError(f"{message}; entry {tuple(int(i) for i in np.argwhere(bad)[0])} does not")


def _text(x: Any) -> str:
    return f"{x.dtype.name}{list(x.shape)}"
