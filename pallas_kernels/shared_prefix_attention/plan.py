"""What one composition of a batch shares, laid out for the kernels: built once on the host, used by every layer."""

import dataclasses
import functools

import jax
import numpy as np
from jaxtyping import Array, Bool, Int

from pallas_kernels.paged_attention.segments import Segments
from pallas_kernels.shared_prefix_attention.crossover import Crossover
from pallas_kernels.shared_prefix_attention.tree import Sharing, find_sharing


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("order", "inverse", "nodes", "level", "covered", "starts"),
    meta_fields=("levels", "granularity"),
)
@dataclasses.dataclass(frozen=True)
class SharedPrefixPlan:
    """Which rows see which shared run of pages. Stays right while sequences grow; not when one joins, leaves or moves.

    Attributes:
      order: query rows, those below any node of the tree neighbours.
      inverse: where each query row stands in that order.
      nodes: segments of rows in that order, padded to a power of two; output rows ``level * rows ..``.
      level: of each node.
      covered: whether a node of a level covers a row, in that order.
      starts: tokens of each sequence that nodes cover: where its own part begins.
      levels: number of levels; 0: nothing is shared, and the plan costs nothing.
      granularity: nodes end at multiples of this many tokens.
    """

    order: Int[Array | np.ndarray, " rows"]
    inverse: Int[Array | np.ndarray, " rows"]
    nodes: Segments
    level: Int[Array | np.ndarray, " nodes"]
    covered: Bool[Array | np.ndarray, "levels rows"]
    starts: Int[Array | np.ndarray, " sequences"]
    levels: int
    granularity: int


def make_plan(
    block_table: Int[np.ndarray, "sequences pages_per_sequence"],
    lengths: Int[np.ndarray, " sequences"],
    query_starts: Int[np.ndarray, " sequences+1"] | None = None,
    *,
    page_size: int,
    rows: int | None = None,
    crossover: Crossover,
    granularity: int | None = None,
    max_levels: int = 4,
) -> SharedPrefixPlan:
    """Finds what is shared and worth sharing.

    Args:
      block_table: pages of each sequence; sequences share what their rows have in common at the beginning.
      lengths: tokens of each sequence, new ones included; 0: an empty slot.
      query_starts: as for `pallas_kernels.paged_attention.paged_attention`; ``None``: one row per sequence.
      page_size: tokens in a page.
      rows: query rows, padding included; ``None``: as many as are used.
      crossover: what sharing costs and saves on the device: see `pallas_kernels.shared_prefix_attention.crossover`.
      granularity: runs end at multiples of this many tokens; ``None``: the page size. For batch-invariant results it is
        `pallas_kernels.paged_attention.segments.ordered_block`.
      max_levels: deepest nesting.

    Raises:
      ValueError: an argument of the wrong shape, or a granularity that is not whole pages.
    """
    block_table, lengths = np.asarray(block_table), np.asarray(lengths)
    granularity = page_size if granularity is None else granularity
    if block_table.ndim != 2 or lengths.shape != block_table.shape[:1]:
        raise ValueError(
            f"block_table {block_table.shape} and lengths {lengths.shape} must be [sequences, pages] and [sequences]"
        )
    if granularity < 1 or granularity % page_size:
        raise ValueError(f"granularity={granularity} must be a positive multiple of page_size={page_size}")
    counts = np.minimum(lengths, 1) if query_starts is None else np.diff(np.asarray(query_starts))
    begins = np.arange(len(lengths)) if query_starts is None else np.asarray(query_starts)[:-1]
    used = len(lengths) if query_starts is None else int(query_starts[-1])
    rows = used if rows is None else rows
    if counts.shape != lengths.shape or rows < used or (counts < 0).any():
        raise ValueError(f"query_starts must rise, hold {len(lengths) + 1} numbers, and end at most at rows={rows}")
    # A row's own token, and those that come after it, are never shared.
    shareable = np.where(counts > 0, np.maximum(lengths - counts, 0), 0)
    sharing = find_sharing(
        block_table,
        shareable,
        counts,
        page_size=page_size,
        worth=crossover.worth,
        granularity=granularity,
        max_levels=max_levels,
    )
    of_nodes = [
        (int(counts[sharing.order[node.first :][: node.count]].sum()), node.end - node.begin) for node in sharing.nodes
    ]
    if not crossover.pays(of_nodes, rows, int((lengths * counts).sum())):
        sharing = dataclasses.replace(sharing, nodes=(), starts=np.zeros_like(sharing.starts))
    return _lay_out(sharing, counts, begins, rows, granularity)


def _lay_out(sharing: Sharing, counts: np.ndarray, begins: np.ndarray, rows: int, granularity: int) -> SharedPrefixPlan:
    runs = [np.arange(begins[s], begins[s] + counts[s]) for s in sharing.order]
    order = np.concatenate([*runs, np.zeros(0, int)]).astype(np.int32)
    order = np.concatenate([order, np.setdiff1d(np.arange(rows, dtype=np.int32), order)])
    offset = np.concatenate([[0], np.cumsum(counts[sharing.order])])
    size = 1 << max(0, len(sharing.nodes) - 1).bit_length()
    fields = np.zeros((7, size), np.int32)
    covered = np.zeros((sharing.levels, rows), bool)
    for i, node in enumerate(sharing.nodes):
        first, last = offset[node.first], offset[node.first + node.count]
        covered[node.level, first:last] = True
        out = node.level * rows + first
        fields[:, i] = (first, last - first, sharing.order[node.first], node.begin, node.end, out, node.level)
    return SharedPrefixPlan(
        order=order,
        inverse=np.argsort(order).astype(np.int32),
        nodes=Segments(*fields[:6]),
        level=fields[6],
        covered=covered,
        starts=sharing.starts,
        levels=sharing.levels,
        granularity=granularity,
    )
