"""The list of work of the GPU kernel: every block once, places of their own, no idle worker."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention.gpu_work import OVERHEAD, Column, Cut, work_list
from pallas_kernels.paged_attention.segments import Segments

WORKERS, KV_HEADS, BLOCK = 12, 2, 64


def listed(counts, begins, ends, *, rows, whole, window=None):
    """The list, and for each worker its pieces as the kernel derives them: unit, first and last block."""
    counts, begins, ends = (np.array(x, np.int32) for x in (counts, begins, ends))
    first = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int32)
    segments = Segments(*map(jnp.asarray, (first, counts, np.arange(len(counts), dtype=np.int32), begins, ends, first)))
    position = np.concatenate([np.arange(e - c, e) for c, e in zip(counts, ends, strict=True)]).astype(np.int32)
    single = rows == 1
    tiles = len(counts) if single else int(counts.sum()) // rows + len(counts)
    cut = Cut(rows, tiles, KV_HEADS, BLOCK, WORKERS, 1, whole, single, single)
    work = jax.jit(lambda s, p: work_list(s, s.query_count > 0, p, window, cut))(segments, jnp.asarray(position))
    table, spans, per = np.asarray(work.tiles), np.asarray(work.spans), int(work.limits[0])
    pieces = []
    for worker in range(WORKERS):
        for unit in range(*spans[worker]):
            tile, head = divmod(unit, KV_HEADS)
            start = table[tile, Column.START] + head * table[tile, Column.COST]
            blocks = table[tile, Column.BLOCKS]
            a, b = np.clip(worker * per - start + np.array([0, per]) - OVERHEAD, 0, blocks)
            pieces.append((worker, unit, *((0, blocks) if whole else (a, b))))
    return work, table, position, pieces


@pytest.mark.sweep("0-1-split", "1-16-whole", "2-16-split")
@pytest.mark.parametrize("whole", [False, True], ids=["split", "whole"])
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("seed", range(3))
def test_every_block_is_in_one_piece(seed, rows, whole):
    rng = np.random.default_rng(seed)
    ends = rng.integers(0, 40, 9) * rng.choice([1, 100], 9)
    counts = np.minimum(ends, 1 if rows == 1 else rng.integers(0, 50, 9))
    work, table, _, pieces = listed(counts, np.zeros(9), ends, rows=rows, whole=whole)
    units = len(table) * KV_HEADS
    found = [[] for _ in range(units)]
    for worker, unit, a, b in pieces:
        if a < b:
            found[unit].append((a, b, unit if whole else unit + worker))
    places = [place for unit in found for _, _, place in unit]
    assert len(set(places)) == len(places)
    for unit, mine in enumerate(found):
        blocks = table[unit // KV_HEADS, Column.BLOCKS]
        assert [a for a, *_ in mine] + [blocks] == [0] + [b for _, b, _ in mine] if mine else blocks == 0
        assert len(mine) == int(work.pieces[unit])
        if mine:
            assert [place for *_, place in mine] == list(
                range(int(work.place[unit]), int(work.place[unit]) + len(mine))
            )
    several = {unit for unit in range(units) if len(found[unit]) > 1}
    jobs = np.asarray(work.jobs)
    for unit in several:
        assert list(jobs[int(work.merged[unit])]) == [int(work.place[unit]), len(found[unit])]
    if rows > 1:  # and no other jobs
        assert (jobs[:, 1] > 0).sum() == len(several)


def test_workers_share_equally_however_skewed_the_lengths():
    ends = np.array([6400] * 3 + [64] * 40)
    _, table, _, pieces = listed(np.ones(43), np.zeros(43), ends, rows=1, whole=False)
    load = np.zeros(WORKERS)
    for worker, _, a, b in pieces:
        load[worker] += b - a
    total = table[:, Column.BLOCKS].sum() * KV_HEADS
    assert load.sum() == total
    # The short ones cost half of their time in overhead, by which their workers have fewer blocks.
    most = max(load[w] + sum(OVERHEAD for x, *_ in pieces if x == w) for w in range(WORKERS))
    assert most <= (total + 43 * KV_HEADS * OVERHEAD) / WORKERS + 2


def test_tiles_visit_what_a_row_sees_and_no_more():
    counts, begins, ends = [40, 1], [0, 128], [300, 200]
    _, table, position, _ = listed(counts, begins, ends, rows=16, whole=False, window=70)
    tiles = [(0, 0, 16), (0, 16, 32), (0, 32, 40), (1, 40, 41)]
    for tile, (segment, first, last) in enumerate(tiles):
        at = position[first:last]
        seen = [[t for t in range(begins[segment], ends[segment]) if p - 70 < t <= p] for p in at]
        blocks = {t // BLOCK for row in seen for t in row}
        block, count = table[tile, Column.BLOCK], table[tile, Column.BLOCKS]
        assert blocks == set(range(block, block + count))
        by_all = set.intersection(*map(set, seen))
        assert set(range(table[tile, Column.FULL_BEGIN], table[tile, Column.FULL_END])) == by_all
    assert not table[len(tiles) :, Column.COST].any()
