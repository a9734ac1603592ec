"""Attention over a paged cache of keys and values: decoding, and ragged batches of prefill chunks and decodes alike."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.paged_attention.cache import QUANTIZED, PagedCache, quantize, slots, write
from pallas_kernels.paged_attention.checks import check_operands, check_tables
from pallas_kernels.paged_attention.core import Implementation, attend_in_order, attend_segments, finish, resolve
from pallas_kernels.paged_attention.segments import decode_segments, ragged_positions, ragged_segments


def paged_attention(
    query: Float[Array, "tokens heads head_dim"],
    cache: PagedCache,
    layer: int | Int[Array, ""],
    block_table: Int[Array, "sequences pages_per_sequence"],
    lengths: Int[Array, " sequences"],
    query_starts: Int[Array, " sequences+1"] | None = None,
    *,
    starts: Int[Array, " sequences"] | None = None,
    window: int | Int[Array, ""] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    invariant: bool = False,
    implementation: Implementation = "auto",
    config: Any = None,
    checked: bool = False,
) -> Any:
    """Causal attention of each sequence's newest tokens to what the cache holds of it, themselves included.

    Store the new tokens first (`write`). The query of a token at position ``p`` sees tokens ``p - window + 1 .. p`` of
    its sequence, from ``starts`` on.

    Args:
      query: without ``query_starts`` one row per sequence, its last token; with it all sequences' rows, one after the
        other. Heads ``g * n .. g * n + n - 1`` share key/value head ``g``, with ``n = heads / kv_heads``.
      cache: keys and values of all layers.
      layer: which layer to attend in; may be traced.
      block_table: the pages of every sequence, in order; entries beyond its length are never read.
      lengths: tokens of every sequence, the new ones included; 0: an empty slot of the batch.
      query_starts: rows ``query_starts[s] .. query_starts[s + 1] - 1`` are the last tokens of sequence ``s``; rows
        beyond the last start are padding.
      starts: first token that a sequence attends to, a multiple of the page size; ``None``: 0.
      window: sliding window in tokens, itself included; may be traced.
      scale: multiplier on logits; ``None``: ``head_dim ** -0.5``.
      softcap: ``softcap * tanh(logit / softcap)`` before the mask.
      return_lse: also return the natural logarithm of the sum of exponentiated logits, float32 ``[tokens, heads]``.
      invariant: the result of a row depends, bit for bit, on nothing but its own query, tokens and position: keys are
        added block by block in order, whatever the batch holds. Costs the freedom to split long sequences.
      implementation: ``xla``, ``cpu`` (C++, needs a compiler once), ``gpu`` (Mosaic GPU, Hopper), ``tpu`` (Mosaic TPU),
        ``reference`` (float32, dense), or ``auto``: the kernel of the platform that the program is for if it supports
        the case, else XLA, and says why in the log.
      config: a configuration of that implementation; ``None``: from the tuning table, or a heuristic.
      checked: also check numbers that are traced, for a function that `jax.experimental.checkify.checkify` transforms.

    Returns:
      Attention ``[tokens, heads, head_dim]`` in the query's type; rows that see nothing are 0 (and -inf).

    Raises:
      ValueError: operands that do not fit together, or a case that the chosen implementation does not support. Numbers
        out of range (pages, lengths) raise where the tables are concrete; see ``checked`` for elsewhere.
    """
    check_operands(query, cache, block_table, lengths, query_starts, starts)
    check_tables(cache, block_table, lengths, query_starts, starts, traced=checked)
    block_table, lengths, query_starts, starts = jax.tree.map(jnp.asarray, (block_table, lengths, query_starts, starts))
    if query_starts is None:
        segments, position = decode_segments(lengths, starts), lengths - 1
    else:
        segments = ragged_segments(lengths, query_starts, starts)
        position = ragged_positions(lengths, query_starts, query.shape[0])
    decode = query_starts is None
    implementation = resolve(query, cache, decode, implementation)
    operands = (query, position, cache, layer, block_table, segments)
    options = {
        "outputs": query.shape[0],
        "decode": decode,
        "window": window,
        "scale": query.shape[-1] ** -0.5 if scale is None else scale,
        "softcap": softcap,
        "implementation": implementation,
        "config": config,
    }
    if invariant:
        out, lse = finish(attend_in_order(*operands, **options), implementation)
    else:
        out, lse = attend_segments(*operands, **options)
    padding = position < 0  # rows of nobody, which no segment writes
    out = jnp.where(padding[:, None, None], 0.0, out).astype(query.dtype)
    return (out, jnp.where(padding[:, None], -jnp.inf, lse)) if return_lse else out


__all__ = [
    "QUANTIZED",
    "Implementation",
    "PagedCache",
    "paged_attention",
    "quantize",
    "slots",
    "write",
]
