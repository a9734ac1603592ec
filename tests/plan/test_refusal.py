"""What compilers say when a program does not fit; the texts are theirs."""

import pytest

from ml.plan.refusal import read_refusal

_GIB = 2**30
EARLY = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (346.32G) exceeds "
    "available HBM (95.73G). HLO module: jit_train_step."
)
LATE = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 19.20G of 15.75G "
    "hbm. Exceeded hbm capacity by 3.45G.\n\nTotal hbm usage >= 19.45G:\n    reserved        258.00M"
)
GPU = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 2147483648 bytes."


@pytest.mark.parametrize(
    ("text", "needed", "available", "temporaries"),
    [(EARLY, 346.32 * _GIB, 95.73 * _GIB, True), (LATE, 19.2 * _GIB, 15.75 * _GIB, False), (GPU, 2**31, None, True)],
)
def test_numbers(text, needed, available, temporaries):
    refusal = read_refusal(text)
    assert refusal.needed_bytes == pytest.approx(needed)
    assert refusal.available_bytes == (available and pytest.approx(available))
    assert refusal.temporaries_only == temporaries


def test_without_numbers_it_is_still_a_refusal():
    refusal = read_refusal("RESOURCE_EXHAUSTED: no luck")
    assert refusal is not None and refusal.needed_bytes is None


def test_another_error_is_none():
    assert read_refusal("INTERNAL: Mosaic failed to compile TPU kernel") is None
