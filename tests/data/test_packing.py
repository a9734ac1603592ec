"""Chunks and rows hold every pair exactly once, whatever the lengths."""

import numpy as np
import pytest

from ml.data.packing import pack_best_fit, split_pairs


@pytest.mark.parametrize("pairs", [1, 2, 7, 8, 9, 16, 100])
@pytest.mark.parametrize("length", [1, 2, 8, 64])
def test_split_covers_every_pair_once(pairs, length):
    chunks = split_pairs(pairs, length)
    covered = np.concatenate([np.arange(start, start + size) for start, size in chunks])
    np.testing.assert_array_equal(covered, np.arange(pairs))
    assert chunks[:, 1].max() <= length
    assert (chunks[:-1, 1] == length).all()


@pytest.mark.parametrize("seed", range(20))
def test_packed_rows_partition_the_chunks_and_fit(seed):
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(1, 80))
    lengths = rng.integers(1, capacity + 1, size=int(rng.integers(0, 300)))
    rows = pack_best_fit(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(lengths[row].sum() <= capacity for row in rows)
    assert all(row == sorted(row) for row in rows)
    assert len(rows) <= 11 / 9 * -(-lengths.sum() // capacity) + len(lengths[2 * lengths > capacity]) + 1


def _slow_best_fit(lengths, capacity):
    """Best-fit decreasing, the long way: look at every open row for every chunk."""
    spaces = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [row for row, space in enumerate(spaces) if space >= length]
        if fitting:
            spaces[min(fitting, key=lambda row: spaces[row])] -= length
        else:
            spaces.append(capacity - length)
    return sorted(spaces)


@pytest.mark.parametrize("seed", range(10))
def test_packing_is_best_fit_decreasing(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 51, size=120)
    rows = pack_best_fit(lengths, 50)
    assert sorted(50 - lengths[row].sum() for row in rows) == _slow_best_fit(lengths, 50)


def test_rows_of_many_short_documents_are_nearly_full():
    lengths = np.random.default_rng(0).integers(1, 256, size=4096)
    rows = pack_best_fit(lengths, 256)
    assert lengths.sum() / (256 * len(rows)) > 0.98
