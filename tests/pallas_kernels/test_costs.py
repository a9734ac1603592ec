"""What kernels have to do, against counting it."""

import numpy as np
import pytest

from pallas_kernels.flash_attention import cost as flash
from pallas_kernels.paged_attention import cost as paged
from pallas_kernels.roofline import Cost
from pallas_kernels.shared_prefix_attention import cost as shared


@pytest.mark.parametrize("window", [None, 1, 3, 50])
def test_pairs_of_causal_sequences(window):
    i, j = np.indices((13, 13))
    seen = (j <= i) & (i - j < (window or 99))
    assert flash.causal_pairs(13, window) == seen.sum()
    assert flash.segment_pairs([13, 1, 0], window) == seen.sum() + 1


def test_flash_attention_s_products_and_arrays():
    shape = {"batch": 2, "queries": 5, "keys": 7, "heads": 4, "kv_heads": 2, "head_dim": 8, "itemsize": 2, "pairs": 70}
    q, k, lse = 2 * 5 * 4 * 8, 2 * 7 * 2 * 8, 4 * 2 * 5 * 4
    assert flash.forward(**shape) == Cost(2 * 2 * 70 * 4 * 8, 2 * (2 * q + 2 * k) + lse)
    assert flash.backward(**shape) == Cost(5 * 2 * 70 * 4 * 8, 2 * (4 * q + 4 * k) + lse)


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("starts", [None, [0, 2, 0, 0]])
def test_paged_attention_counts_what_rows_see(window, starts):
    lengths, rows = [9, 6, 0, 3], [1, 4, 0, 3]
    first = [0] * 4 if starts is None else starts
    pairs, read = 0, set()
    for s, (length, new) in enumerate(zip(lengths, rows, strict=True)):
        for position in range(length - new, length):
            seen = {t for t in range(first[s], position + 1) if window is None or t > position - window}
            pairs += len(seen)
            read |= {(s, t) for t in seen}
    options = {"heads": 6, "kv_heads": 2, "head_dim": 8, "itemsize": 4, "window": window, "starts": starts}
    got = paged.cost(lengths, rows, cache_itemsize=1, quantized=True, **options)
    assert got == Cost(4 * pairs * 6 * 8, len(read) * 2 * 2 * (8 + 4) + 2 * sum(rows) * 6 * 8 * 4)
    one = paged.cost([5, 0], heads=6, kv_heads=2, head_dim=8, itemsize=4, cache_itemsize=4)
    assert one == Cost(4 * 5 * 6 * 8, 5 * 2 * 2 * 8 * 4 + 2 * 6 * 8 * 4), "an empty slot costs nothing"


def test_a_prefix_is_read_once_for_all_its_rows():
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 8, "itemsize": 2, "cache_itemsize": 1}
    assert shared.prefix([(3, 10)], **shape) == Cost(4 * 30 * 4 * 8, 2 * 10 * 2 * 8 + 2 * 3 * 4 * 8 * 2)
    assert shared.prefix([(3, 10), (5, 2)], **shape) == shared.prefix([(3, 10)], **shape) + shared.prefix(
        [(5, 2)], **shape
    )


def test_the_slower_of_products_and_traffic():
    cost = Cost(flops=100, bytes=10)
    assert (cost.seconds(10, 10), cost.bound(10, 10)) == (10, "compute")
    assert (cost.seconds(1000, 10), cost.bound(1000, 10)) == (1, "memory")
