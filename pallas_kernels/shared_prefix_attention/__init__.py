"""Attention of many sequences that share prefixes: each shared run of the cache is read once for all of them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.log_sum_exp import merge_all
from pallas_kernels.paged_attention import Implementation, PagedCache, paged_attention
from pallas_kernels.paged_attention.checks import check_operands, check_tables
from pallas_kernels.paged_attention.core import attend_in_order, attend_segments, finish, resolve
from pallas_kernels.paged_attention.segments import (
    Carry,
    decode_segments,
    ordered_block,
    ragged_positions,
    ragged_segments,
)
from pallas_kernels.shared_prefix_attention.crossover import Crossover, Shapes, crossover
from pallas_kernels.shared_prefix_attention.plan import SharedPrefixPlan, make_plan


def shared_prefix_attention(
    query: Float[Array, "tokens heads head_dim"],
    cache: PagedCache,
    layer: int | Int[Array, ""],
    block_table: Int[Array, "sequences pages_per_sequence"],
    lengths: Int[Array, " sequences"],
    plan: SharedPrefixPlan,
    query_starts: Int[Array, " sequences+1"] | None = None,
    *,
    window: int | Int[Array, ""] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    invariant: bool = False,
    implementation: Implementation = "auto",
    config: Any = None,
    checked: bool = False,
) -> Any:
    """What `paged_attention` computes, with every shared run of pages read once for all rows below it.

    Softmax over the union of disjoint runs of keys is the log-sum-exp merge of those over each (Juravsky et al. 2024,
    Hydragen, section 3.1, here for a tree of any depth, groups of any size and ragged rows): the rows below a node of
    the prefix tree, times the query heads of a group, become one matrix that meets the node's keys; each sequence's own
    tokens go through the paged core; results merge exactly, in float32.

    Args:
      query, cache, layer, block_table, lengths, query_starts: as in `paged_attention`.
      window, scale, softcap, return_lse, implementation, config, checked: likewise.
      plan: of this composition of the batch, by `make_plan` from the same tables; lengths may have grown since.
      invariant: bit for bit the same as `paged_attention` with ``invariant``; the plan's granularity must be a
        multiple of `ordered_block` of the page size.

    Returns:
      As `paged_attention`.

    Raises:
      ValueError: as `paged_attention`; a plan for another number of rows or sequences.
    """
    options: dict[str, Any] = {"window": window, "scale": scale, "softcap": softcap}
    if plan.starts.shape != lengths.shape or plan.order.shape != query.shape[:1]:
        raise ValueError(
            f"plan is for {plan.starts.shape[0]} sequences and {plan.order.shape[0]} query rows, "
            f"but there are {lengths.shape[0]} and {query.shape[0]}"
        )
    block = ordered_block(cache.page_size)
    if invariant and plan.granularity % block:
        raise ValueError(f"invariant needs a plan with granularity a multiple of {block}, not {plan.granularity}")
    if plan.levels == 0:
        options |= {
            "return_lse": return_lse,
            "invariant": invariant,
            "implementation": implementation,
            "checked": checked,
        }
        return paged_attention(query, cache, layer, block_table, lengths, query_starts, **options, config=config)
    check_operands(query, cache, block_table, lengths, query_starts, None)
    check_tables(cache, block_table, lengths, query_starts, None, traced=checked)
    tables = cache, layer, jnp.asarray(block_table)
    on_device: Any = jax.tree.map(jnp.asarray, (lengths, query_starts, plan))
    lengths, query_starts, plan = on_device
    decode = query_starts is None
    rows = query.shape[0]
    options |= {
        "scale": query.shape[-1] ** -0.5 if scale is None else scale,
        "implementation": resolve(query, cache, decode, implementation),
        "config": config,
    }
    position = lengths - 1 if decode else ragged_positions(lengths, query_starts, rows)
    starts = jnp.asarray(plan.starts)
    own = decode_segments(lengths, starts) if decode else ragged_segments(lengths, query_starts, starts)
    attend = _ordered if invariant else _merged
    out, lse = attend(query, position, tables, plan, own, decode, options)
    padding = position < 0
    out = jnp.where(padding[:, None, None], 0.0, out).astype(query.dtype)
    return (out, jnp.where(padding[:, None], -jnp.inf, lse)) if return_lse else out


def _merged(query, position, tables: tuple[PagedCache, Any, Array], plan, own, decode, options: dict[str, Any]):
    """All levels in one call, the sequences' own tokens in another, and one merge."""
    rows = query.shape[0]
    order, inverse = plan.order, plan.inverse
    outputs = plan.levels * rows
    shared = attend_segments(
        query[order], position[order], *tables, plan.nodes, outputs=outputs, decode=False, **options
    )
    shared_out, shared_lse = (x.reshape(plan.levels, rows, *x.shape[1:])[:, inverse] for x in shared)
    covered = plan.covered[:, inverse]
    shared_out = jnp.where(covered[..., None, None], shared_out, 0.0)
    shared_lse = jnp.where(covered[..., None], shared_lse, -jnp.inf)
    own_out, own_lse = attend_segments(query, position, *tables, own, outputs=rows, decode=decode, **options)
    padding = position < 0
    own_out = jnp.where(padding[:, None, None], 0.0, own_out)
    return merge_all(jnp.concatenate([shared_out, own_out[None]]), jnp.concatenate([shared_lse, own_lse[None]]))


def _ordered(query, position, tables: tuple[PagedCache, Any, Array], plan, own, decode, options: dict[str, Any]):
    """Level after level, then the sequences' own tokens: the order in which an unshared computation adds them."""
    rows = query.shape[0]
    order, inverse = plan.order, plan.inverse
    carry = Carry.nothing(*query.shape)
    for level in range(plan.levels):
        count = jnp.where(plan.level == level, plan.nodes.query_count, 0)
        nodes = dataclasses.replace(plan.nodes, query_count=count, out_begin=plan.nodes.query_begin)
        carry = attend_in_order(
            query[order], position[order], *tables, nodes, carry, outputs=rows, decode=False, **options
        )
    carry = jax.tree.map(lambda x: x[inverse], carry)
    carry = attend_in_order(query, position, *tables, own, carry, outputs=rows, decode=decode, **options)
    return finish(carry, options["implementation"])


__all__ = ["Crossover", "Shapes", "SharedPrefixPlan", "crossover", "make_plan", "shared_prefix_attention"]
