"""Interval masks and the tiles that they make visible, against the whole mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.flash_attention.cost import causal_pairs
from pallas_kernels.flash_attention.intervals import (
    Band,
    segment_intervals,
    self_intervals,
    static_band,
    tile_bounds,
    transposed_tile_bounds,
)

LENGTH = 37
SEGMENTS = np.sort(np.random.default_rng(0).integers(0, 4, (2, LENGTH)), axis=1).astype(np.int32)


def mask(intervals, keys):
    return (intervals[..., :1] <= np.arange(keys)) & (np.arange(keys) < intervals[..., 1:])


@pytest.mark.parametrize("window", [None, 1, 5, 36, 37, 2**40])
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["whole", "segments"])
def test_self_attention(window, segments):
    row, column = np.arange(LENGTH)[:, None], np.arange(LENGTH)
    expected = (column <= row) & (column > row - (window or LENGTH))
    if segments is not None:
        expected = expected & (segments[:, :, None] == segments[:, None])
    static = self_intervals(LENGTH, window, segments)
    assert isinstance(static, np.ndarray) and static.dtype == np.int32
    np.testing.assert_array_equal(mask(static, LENGTH), np.broadcast_to(expected, (len(static), LENGTH, LENGTH)))
    traced = jax.jit(lambda w, s: self_intervals(LENGTH, w, s))(min(window or 99, 2**30), segments)
    np.testing.assert_array_equal(traced, static)
    if segments is None:
        assert mask(static, LENGTH).sum() == causal_pairs(LENGTH, window)
        assert static_band(static) == Band(min(window or LENGTH, LENGTH) - 1, 0)


def test_equal_ids_apart_from_each_other_are_two_segments():
    np.testing.assert_array_equal(self_intervals(4, None, np.array([[7, 7, 3, 7]]))[0, :, 0], [0, 0, 2, 3])


def cases():
    rng = np.random.default_rng(1)
    for window in (None, 1, 5, 40):
        yield self_intervals(LENGTH, window), LENGTH, True
        yield self_intervals(LENGTH, window, SEGMENTS), LENGTH, True
    for _ in range(20):  # any at all, also empty ones and ends that lie outside
        yield rng.integers(-5, 30, (2, 19, 2)).astype(np.int32), 25, False
    yield np.zeros((1, 9, 2), np.int32), 25, False


@pytest.mark.parametrize("blocks", [(4, 6), (8, 3), (64, 64), (1, 1)])
@pytest.mark.parametrize("transposed", [False, True])
def test_tiles_cover_what_is_visible_and_full_ones_hide_nothing(blocks, transposed):
    bounds = transposed_tile_bounds if transposed else tile_bounds
    some_full = False
    for intervals, keys, tight in cases():
        visible = mask(intervals, keys)
        batch, queries, _ = visible.shape
        padded = np.pad(visible, ((0, 0), (0, -queries % blocks[0]), (0, -keys % blocks[1])))
        tiled = padded.reshape(batch, -(-queries // blocks[0]), blocks[0], -(-keys // blocks[1]), blocks[1])
        some, full = tiled.any((2, 4)), tiled.all((2, 4))
        if transposed:
            some, full = some.swapaxes(1, 2), full.swapaxes(1, 2)
        got = bounds(intervals, *blocks, keys)
        assert np.all(got.first <= got.first_full) and np.all(got.first_full <= got.last_full)
        assert np.all(got.last_full <= got.last) and np.all(got.last <= some.shape[2])
        tile = np.arange(some.shape[2])
        visited = (got.first[..., None] <= tile) & (tile < got.last[..., None])
        unmasked = (got.first_full[..., None] <= tile) & (tile < got.last_full[..., None])
        assert not np.any(some & ~visited) and not np.any(unmasked & ~full)
        if tight:
            np.testing.assert_array_equal(visited, some)
            np.testing.assert_array_equal(unmasked, full)
        some_full |= unmasked.any()
        traced = jax.jit(bounds, static_argnums=(1, 2, 3))(jnp.asarray(intervals), *blocks, keys)
        for ours, jitted in zip(got, traced, strict=True):
            assert ours.dtype == jitted.dtype == np.int32
            np.testing.assert_array_equal(ours, jitted)
    assert some_full or blocks == (64, 64)


@pytest.mark.parametrize("xp", [np, jnp], ids=["numpy", "jax"])
def test_an_encoder_sees_its_whole_segment(xp):
    segments = np.array([[1, 1, 2, 2, 2, 0, 0], [3, 3, 3, 3, 3, 3, 3], [1, 2, 3, 4, 4, 1, 0]])
    intervals = np.asarray(segment_intervals(7, xp.asarray(segments)))
    for row, ids in enumerate(segments):
        for i in range(7):
            run = [j for j in range(7) if len(set(ids[min(i, j) : max(i, j) + 1])) == 1]
            assert intervals[row, i].tolist() == [run[0], run[-1] + 1]
    assert segment_intervals(7).tolist() == [[[0, 7]] * 7]
