"""Who holds which part of a sequence, and how much each device of a ring has to do."""

import numpy as np
import pytest

from ml.errors import UserError
from ml.parallel.context import check_length, ring, ring_work, sequence_order
from ml.parallel.context.order import chunks
from pallas_kernels.flash_attention import xla
from pallas_kernels.flash_attention.intervals import Tiles, self_intervals


def test_zigzag_pairs_an_early_chunk_with_a_late_one():
    np.testing.assert_array_equal(sequence_order(12, 3, "zigzag"), [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7])
    np.testing.assert_array_equal(sequence_order(12, 3, "contiguous"), np.arange(12))
    np.testing.assert_array_equal(sequence_order(7, 1, "zigzag"), np.arange(7))


@pytest.mark.parametrize("shards", [2, 8, 64])
@pytest.mark.parametrize("length", [1024, 65536])
def test_zigzag_balances_every_step_of_the_ring(length, shards):
    """Work on 8 devices at 65536 tokens: zig-zag 1.00 of the mean everywhere; contiguous 0.13 to 1.87 of it."""
    work = ring_work(length, shards, "zigzag")
    assert work.shape == (shards, shards)
    assert np.all(np.abs(work / work.mean(axis=0) - 1) < 0.05)
    assert work.sum() >= length * (length + 1) // 2, "some visible pair is not computed"


def test_contiguous_order_leaves_the_first_device_idle():
    work = ring_work(65536, 8, "contiguous").sum(axis=1)
    assert work.max() > 1.7 * work.mean() and work.min() < 0.3 * work.mean()


def test_little_more_is_computed_than_is_visible():
    length = 65536
    for order in ("zigzag", "contiguous"):
        assert ring_work(length, 8, order).sum() < 1.05 * length * (length + 1) // 2
        in_windows = 4096 * length - 4096 * 4095 // 2
        assert ring_work(length, 8, order, window=4096).sum() < 1.25 * in_windows


@pytest.mark.parametrize(("window", "steps"), [(1, 1), (2, 2), (9, 2), (10, 3), (57, 8), (1000, 8), (None, 8)])
def test_the_ring_stops_where_the_window_ends(window, steps):
    """Contiguous parts of 8 tokens: a window of 9 reaches back to all of the part before, one of 10 beyond."""
    work = ring_work(64, 8, "contiguous", window)
    assert work.shape == (8, steps)
    assert work[:, -1].any()
    assert ring_work(64, 8, "zigzag", window).shape[1] == (1 if window == 1 else 8)


def test_the_count_is_the_rule_by_which_tiles_are_computed(monkeypatch):
    assert ring.tile_bounds is xla.tile_bounds
    nothing = lambda visible, tile_q, *_: Tiles(*np.zeros((4, 1, visible.shape[1] // tile_q), int))  # noqa: E731
    monkeypatch.setattr(ring, "tile_bounds", nothing)
    assert not ring_work(64, 8, "zigzag").any()


@pytest.mark.parametrize("order", ["zigzag", "contiguous"])
@pytest.mark.parametrize("window", [None, 9])
def test_what_a_row_sees_of_the_keys_of_a_shard_is_one_interval(order, window):
    """By looking up every key that a shard holds."""
    length, shards = 48, 4
    table = chunks(shards, order)
    size = length // table.size
    rows = self_intervals(length, window)
    for held in table:
        keys = (held[:, None] * size + np.arange(size)).reshape(-1)
        seen = (rows[0, :, :1] <= keys) & (keys < rows[0, :, 1:])
        local = ring._local(rows, held, size)[0]
        np.testing.assert_array_equal(
            seen, (local[:, :1] <= np.arange(len(keys))) & (np.arange(len(keys)) < local[:, 1:])
        )


@pytest.mark.parametrize(
    ("length", "shards", "order", "message"),
    [
        (1000, 8, "zigzag", r"sequence_length=1000 .* 16 chunks .*sequence=8 .*multiple of 16, such as 992"),
        (1004, 8, "contiguous", r"sequence_length=1004 .* 8 chunks .*multiple of 8, such as 1000"),
        (8, 8, "zigzag", r"such as 16"),
        (64, 8, "striped", r"sequence_order='striped'; choose zigzag or contiguous"),
    ],
)
def test_refuses_what_does_not_divide(length, shards, order, message):
    with pytest.raises(UserError, match=message):
        sequence_order(length, shards, order)
    with pytest.raises(UserError, match=message):
        check_length(length, shards, order)
