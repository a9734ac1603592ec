"""Cuts documents into chunks of at most a row's length, and fits short chunks together into rows.

A document of text tokens ``t1 .. tn`` is the sequence ``BOS t1 .. tn EOS``, or ``n + 1`` (input, target) pairs.
The model predicts every text token and the end, each exactly once. A document longer than a row is cut between pairs:
the chunk's last target is the next chunk's first input, so cutting loses no target and repeats none; it only shortens
the context. Since every text token is a target once, the summed loss of a text divided by its UTF-8 bytes is a true
code length, comparable with that of a compressor.
"""

import bisect

import numpy as np
from jaxtyping import Int64


def split_pairs(pairs: int, length: int) -> Int64[np.ndarray, "chunks 2"]:
    """Cuts ``pairs`` (input, target) pairs into chunks ``(start, size)`` of ``length``, the last maybe shorter."""
    starts = np.arange(0, pairs, length, dtype=np.int64)
    return np.stack([starts, np.minimum(length, pairs - starts)], axis=1)


def pack_best_fit(lengths: Int64[np.ndarray, "chunks"], capacity: int) -> list[list[int]]:
    """Best-fit decreasing bin packing (Johnson 1973): longest first, each into the fullest row that still holds it.

    Args:
      lengths: between 1 and ``capacity``.
      capacity: length of a row.

    Returns:
      Rows as lists of indices into ``lengths``, ascending within a row; every index appears once. Depends on nothing
      but the arguments. At most 11/9 of the fewest possible rows, plus one.
    """
    rows: list[list[int]] = []
    spaces: list[int] = []  # the distinct free spaces of open rows, ascending
    rows_by_space: dict[int, list[int]] = {}
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        place = bisect.bisect_left(spaces, length)
        if place == len(spaces):
            row, space = len(rows), capacity
            rows.append([])
        else:
            space = spaces[place]
            row = rows_by_space[space].pop()
            if not rows_by_space[space]:
                del rows_by_space[space], spaces[place]
        rows[row].append(index)
        left = space - length
        if left:
            if left not in rows_by_space:
                bisect.insort(spaces, left)
                rows_by_space[left] = []
            rows_by_space[left].append(row)
    return [sorted(row) for row in rows]
