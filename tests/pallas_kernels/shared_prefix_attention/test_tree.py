"""The prefix tree against brute force over all pairs of sequences."""

import itertools

import numpy as np
import pytest

from pallas_kernels.shared_prefix_attention.tree import Node, find_sharing

PAGE = 4


def _find(table, shareable=None, rows=None, worth=lambda n, t: True, granularity=PAGE, max_levels=9):
    table = np.asarray(table, np.int32)
    shareable = np.full(len(table), table.shape[1] * PAGE) if shareable is None else np.asarray(shareable)
    rows = np.ones(len(table), int) if rows is None else np.asarray(rows)
    return find_sharing(
        table, shareable, rows, page_size=PAGE, worth=worth, granularity=granularity, max_levels=max_levels
    )


def _random_tables(seed):
    """Sequences that branch off one another at random places, in random order, garbage behind their ends."""
    rng = np.random.default_rng(seed)
    fresh = itertools.count()
    sequences = [[next(fresh) for _ in range(rng.integers(0, 7))]]
    for _ in range(rng.integers(1, 14)):
        parent = sequences[rng.integers(len(sequences))]
        kept = parent[: rng.integers(0, len(parent) + 1)]
        sequences.append(kept + [next(fresh) for _ in range(rng.integers(0, 4))])
    table = rng.integers(0, 5, (len(sequences), 24))
    order = rng.permutation(len(sequences))
    lengths = np.array([len(sequences[s]) for s in order])
    for row, s in enumerate(order):
        table[row, : len(sequences[s])] = sequences[s]
    return table, lengths * PAGE + rng.integers(0, PAGE, len(lengths))


@pytest.mark.parametrize("seed", range(25))
def test_covers_exactly_what_some_other_sequence_shares(seed):
    table, shareable = _random_tables(seed)
    sharing = _find(table, shareable)
    assert sorted(sharing.order) == list(range(len(table)))
    covered = np.zeros((len(table), table.shape[1]), int)
    for node in sharing.nodes:
        members = sharing.order[node.first : node.first + node.count]
        pages = slice(node.begin // PAGE, node.end // PAGE)
        assert node.count >= 2 and node.end > node.begin
        assert (table[members, pages] == table[members[0], pages]).all()
        covered[members, pages] += 1
    for s in range(len(table)):
        shared = max(_common(table, shareable, s, t) for t in range(len(table)) if t != s)
        # Each shared page once, none beyond, and the sequence's own part begins right behind.
        assert covered[s].tolist() == [1] * shared + [0] * (table.shape[1] - shared)
        assert sharing.starts[s] == shared * PAGE


def _common(table, shareable, s, t):
    most = min(shareable[s], shareable[t]) // PAGE
    different = np.flatnonzero(table[s, :most] != table[t, :most])
    return int(different[0]) if len(different) else int(most)


def test_levels_nest():
    table = [[1, 2, 3, 4], [9, 9, 9, 9], [1, 2, 3, 5], [1, 2, 6, 7], [1, 8, 8, 8]]
    sharing = _find(table)
    assert sharing.order.tolist() == [0, 2, 3, 4, 1]
    assert sharing.nodes == (Node(0, 4, 0, 4, 0), Node(0, 3, 4, 8, 1), Node(0, 2, 8, 12, 2))
    assert sharing.starts.tolist() == [12, 0, 12, 8, 4]
    assert sharing.levels == 3


def test_what_a_dropped_node_held_goes_to_its_children():
    table = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 6, 3, 5], [1, 6, 3, 7]]
    sharing = _find(table, worth=lambda rows, tokens: tokens > PAGE)
    assert sharing.nodes == (Node(0, 2, 0, 12, 0), Node(2, 2, 0, 12, 0))
    only_one_level = _find(table, max_levels=1)
    assert only_one_level.nodes == (Node(0, 4, 0, 4, 0),)
    assert only_one_level.starts.tolist() == [4] * 4


def test_worth_sees_rows_and_tokens():
    asked = []
    _find([[1, 2], [1, 2], [3, 4]], shareable=[8, 8, 8], rows=[3, 2, 1], worth=lambda *x: asked.append(x))
    assert asked == [(5, 8)]


def test_granularity_rounds_down():
    sharing = _find([[1, 2, 3, 4], [1, 2, 3, 5]], granularity=2 * PAGE)
    assert sharing.nodes == (Node(0, 2, 0, 8, 0),)


def test_nothing_to_share():
    for table in ([[1, 2]], [[1, 2], [3, 2]], np.zeros((0, 3)), np.zeros((2, 0))):
        sharing = _find(np.asarray(table))
        assert (sharing.nodes, sharing.levels) == ((), 0)
        assert sharing.starts.tolist() == [0] * len(table)
