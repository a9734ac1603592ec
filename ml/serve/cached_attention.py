"""Attention over a paged key/value cache, which it extends and reads."""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from ml.models import AttentionLayer, TransformerConfig
from pallas_kernels.paged_attention import Implementation, PagedCache, paged_attention, slots, write
from pallas_kernels.paged_attention.segments import ragged_positions
from pallas_kernels.sharded import on_shards
from pallas_kernels.shared_prefix_attention import SharedPrefixPlan, shared_prefix_attention


def empty_cache(config: TransformerConfig, pages: int, page_size: int, dtype: Any) -> PagedCache:
    """Room for ``pages * page_size`` tokens of all layers; ``dtype`` is that of the activations, or a quantized one."""
    return PagedCache.zeros(config.num_layers, pages, page_size, config.num_kv_heads, config.head_dim, dtype)


@flax.struct.dataclass
class PagedAttention:
    """Stores the keys and values of new tokens, then attends to everything that the cache holds of their sequences.

    The tokens of all sequences follow one another, whatever the shape ``[batch, length]`` that the model gives them: a
    decode step is ``[sequences, 1]``, a ragged mix of prefill chunks and decodes ``[1, tokens]``.

    Attributes:
      block_table: the pages of each sequence; a token beyond them is not stored.
      lengths: tokens of each sequence, the new ones included; 0: an empty slot.
      query_starts: see `pallas_kernels.paged_attention.paged_attention`; ``None``: one new token per sequence.
      plan: what the sequences share, read once for all of them; ``None``: each reads its own.
      invariant: see `pallas_kernels.paged_attention.paged_attention`.
      implementation: likewise.
    """

    block_table: Int[Array, "sequences pages_per_sequence"]
    lengths: Int[Array, " sequences"]
    query_starts: Int[Array, " sequences+1"] | None = None
    plan: SharedPrefixPlan | None = None
    invariant: bool = flax.struct.field(pytree_node=False, default=False)
    implementation: Implementation = flax.struct.field(pytree_node=False, default="auto")

    def attend(
        self, layer: AttentionLayer, query: jax.Array, key: jax.Array, value: jax.Array, state: PagedCache
    ) -> tuple[jax.Array, PagedCache]:
        """See `ml.models.AttentionStrategy.attend`; on a mesh, heads of query and cache are cut alike."""
        # Each device writes and reads its own heads; a window that all layers have stays static.
        static = layer.window if isinstance(layer.window, int) else None
        traced = layer.window if static is None else None

        def local(tables, index, window, query, key, value, state):
            window = window if static is None else static
            here = AttentionLayer(index, window, layer.scale, layer.softcap)
            return tables._on_one_device(here, query, key, value, state)

        operands = (self, jnp.asarray(layer.index), traced, query, key, value, state)
        return on_shards(local, operands, (query, state))

    def _on_one_device(self, layer, query, key, value, state):
        rows = _rows(query)
        sequence, position = self.places(rows.shape[0])
        where = slots(self.block_table, sequence, position, state.page_size)
        state = write(state, layer.index, _rows(key), _rows(value), where)
        attend: Callable[..., jax.Array] = paged_attention
        if self.plan is not None:
            attend = functools.partial(shared_prefix_attention, plan=self.plan)
        out = attend(
            rows,
            state,
            layer.index,
            self.block_table,
            self.lengths,
            query_starts=self.query_starts,
            window=layer.window,
            scale=layer.scale,
            softcap=layer.softcap,
            invariant=self.invariant,
            implementation=self.implementation,
        )
        return out.reshape(query.shape), state

    def places(self, rows: int) -> tuple[Int[Array, " rows"], Int[Array, " rows"]]:
        """Sequence and position of each row; the position of a row that is nobody's is -1."""
        if self.query_starts is None:
            return jnp.arange(rows), self.lengths - 1
        sequence = jnp.searchsorted(self.query_starts, jnp.arange(rows), side="right") - 1
        return sequence, ragged_positions(self.lengths, self.query_starts, rows)


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(-1, *x.shape[2:])
