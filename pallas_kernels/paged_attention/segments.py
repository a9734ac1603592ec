"""What the kernels compute: segments, each of them some query rows against a run of one sequence's tokens.

Decoding, ragged prefill and shared prefixes differ in their segments alone, so that one core per platform serves all:

- decoding: a segment per sequence, of one row, against all its tokens;
- prefill, whole or in chunks: a segment per sequence, of as many rows as there are new tokens;
- a shared prefix: a segment of the rows of all sequences below a node of the prefix tree, against the node's tokens.

The seam between the front and a platform is one function of this signature, which each backend module exposes::

    attend(query, position, cache, layer, block_table, segments, *, outputs, decode, window, scale, softcap,
           carry=None, ordered=False, config=None) -> (out, log_sum_exp) or Carry
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("query_begin", "query_count", "table_row", "kv_begin", "kv_end", "out_begin"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class Segments:
    """Query rows ``query_begin ..`` against tokens ``kv_begin <= j < kv_end`` of the pages in row ``table_row``.

    A row at ``position`` p sees the tokens of its segment with ``p - window < j <= p``.

    Attributes:
      query_begin: first row in ``query``.
      query_count: number of rows; 0: an unused segment, which writes nothing.
      table_row: row of the block table.
      kv_begin: first token, a multiple of the page size.
      kv_end: one past the last; where it is not above ``kv_begin`` the rows' result is nothing (0, -inf).
      out_begin: first row of the output. No two segments write the same row.
    """

    query_begin: Int[Array, " segments"]
    query_count: Int[Array, " segments"]
    table_row: Int[Array, " segments"]
    kv_begin: Int[Array, " segments"]
    kv_end: Int[Array, " segments"]
    out_begin: Int[Array, " segments"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=("total", "weight", "peak"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Carry:
    """The state of an unfinished softmax, to go on from, bit for bit, with later tokens of the same rows.

    Attributes:
      total: sum of the values, each times ``exp(logit - peak)``.
      weight: sum of those factors.
      peak: greatest logit so far in the backend's own unit; -inf where nothing was seen.
    """

    total: Float[Array, "outputs heads head_dim"]
    weight: Float[Array, "outputs heads"]
    peak: Float[Array, "outputs heads"]

    @classmethod
    def nothing(cls, outputs: int, heads: int, head_dim: int) -> "Carry":
        """Before the first token."""
        shape = (outputs, heads)
        return cls(jnp.zeros((*shape, head_dim)), jnp.zeros(shape), jnp.full(shape, -jnp.inf))


def ordered_block(page_size: int) -> int:
    """Tokens between the places where an ordered computation may be cut in two: whole pages, at least 128 tokens."""
    return page_size * -(-128 // page_size)


def decode_segments(lengths: Int[Array, " sequences"], starts: Int[Array, " sequences"] | None = None) -> Segments:
    """One row per sequence, which sees its tokens ``starts .. lengths - 1``."""
    rows = jnp.arange(lengths.shape[0], dtype=jnp.int32)
    begin = jnp.zeros_like(rows) if starts is None else starts.astype(jnp.int32)
    return Segments(rows, jnp.ones_like(rows), rows, begin, lengths.astype(jnp.int32), rows)


def ragged_segments(
    lengths: Int[Array, " sequences"],
    query_starts: Int[Array, " sequences+1"],
    starts: Int[Array, " sequences"] | None = None,
) -> Segments:
    """Rows ``query_starts[s] .. query_starts[s + 1] - 1`` are the last tokens of sequence ``s``."""
    query_starts = query_starts.astype(jnp.int32)
    rows = jnp.arange(lengths.shape[0], dtype=jnp.int32)
    begin = jnp.zeros_like(rows) if starts is None else starts.astype(jnp.int32)
    return Segments(
        query_starts[:-1], jnp.diff(query_starts), rows, begin, lengths.astype(jnp.int32), query_starts[:-1]
    )


def ragged_positions(
    lengths: Int[Array, " sequences"], query_starts: Int[Array, " sequences+1"], rows: int
) -> Int[Array, " rows"]:
    """Where in its sequence each query row stands; -1 for rows beyond ``query_starts[-1]``."""
    row = jnp.arange(rows, dtype=jnp.int32)
    sequence = jnp.searchsorted(query_starts, row, side="right", method="compare_all").astype(jnp.int32) - 1
    held = jnp.clip(sequence, 0, lengths.shape[0] - 1)
    position = lengths[held] - (query_starts[held + 1] - row)
    return jnp.where(row < query_starts[-1], position, -1).astype(jnp.int32)
