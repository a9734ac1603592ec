"""Finds which sequences share leading pages, from their block tables alone: NumPy, no JAX."""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Int


@dataclasses.dataclass(frozen=True)
class Node:
    """A run of pages that several sequences, neighbours in `Sharing.order`, have in common.

    Attributes:
      first: place of its first sequence in the order.
      count: number of sequences, at least 2.
      begin: first token.
      end: one past the last token.
      level: number of kept nodes above it.
    """

    first: int
    count: int
    begin: int
    end: int
    level: int


@dataclasses.dataclass(frozen=True)
class Sharing:
    """A prefix tree's nodes that are worth computing for all their sequences at once.

    Attributes:
      order: sequences, so ordered that those below any node are neighbours.
      nodes: kept nodes, parents before children.
      starts: per sequence (in its own numbering) the first token that no kept node covers.
    """

    order: Int[np.ndarray, " sequences"]
    nodes: tuple[Node, ...]
    starts: Int[np.ndarray, " sequences"]

    @property
    def levels(self) -> int:
        """Most nodes above any token, it included."""
        return max((node.level + 1 for node in self.nodes), default=0)


def find_sharing(
    block_table: Int[np.ndarray, "sequences pages_per_sequence"],
    shareable: Int[np.ndarray, " sequences"],
    rows: Int[np.ndarray, " sequences"],
    *,
    page_size: int,
    worth: Callable[[int, int], bool],
    granularity: int,
    max_levels: int,
) -> Sharing:
    """Builds the prefix tree and keeps, from the root down, the nodes that are worth it.

    A node that is not kept leaves its tokens to its children, and at the last to the sequences themselves.

    Args:
      block_table: pages of each sequence; equal leading entries mean equal tokens.
      shareable: leading tokens of each sequence that all its query rows see.
      rows: query rows of each sequence.
      page_size: tokens in a page.
      worth: ``worth(rows, tokens)``, whether computing tokens at once for so many query rows beats doing it row by row.
      granularity: nodes end at multiples of this many tokens, itself a multiple of the page size.
      max_levels: deepest nesting to keep.
    """
    pages = np.minimum(shareable // page_size, block_table.shape[1])
    known = np.arange(block_table.shape[1])[None, :] < pages[:, None]
    # Most significant byte first, so that comparing bytes is comparing pages; 0 stands for the end.
    keys = np.where(known, block_table.astype(np.int64) + 1, 0).astype(">u4")
    order = np.array(sorted(range(len(keys)), key=lambda s: keys[s].tobytes()), np.int32)
    kept: list[Node] = []
    starts = np.zeros(len(order), np.int32)
    # A node that was dropped hands down where its tokens begin, so children are visited after their parent.
    pending = [(interval, 0, 0) for interval in reversed(_intervals(keys[order], pages[order]))]
    while pending:
        (first, last, depth, children), begin, level = pending.pop()
        end = depth * page_size // granularity * granularity
        members = order[first : last + 1]
        if end > begin and level < max_levels and worth(int(rows[members].sum()), end - begin):
            kept.append(Node(first, last - first + 1, begin, end, level))
            starts[members] = end
            begin, level = end, level + 1
        pending += [(child, begin, level) for child in reversed(children)]
    return Sharing(order, tuple(kept), starts)


def _intervals(keys: np.ndarray, pages: np.ndarray) -> list[tuple]:
    """The inner nodes of the tree over sorted keys, as nested ``(first, last, pages in common, children)``."""
    different = np.pad(keys[:-1] != keys[1:], ((0, 0), (0, 1)), constant_values=True)
    common = np.minimum(different.argmax(axis=1), np.minimum(pages[:-1], pages[1:]))
    roots: list[tuple] = []
    stack: list[list] = []  # open nodes: first, pages in common, children
    for i, depth in enumerate([*common.tolist(), 0]):
        first, closed = i, None
        while stack and stack[-1][1] > depth:
            first, inner, children = stack.pop()
            if closed is not None:
                children.append(closed)
            closed = (first, i, inner, children)
        if depth == 0:
            roots += [] if closed is None else [closed]
        elif stack and stack[-1][1] == depth:
            stack[-1][2].extend([] if closed is None else [closed])
        else:
            stack.append([first, depth, [] if closed is None else [closed]])
    return roots
