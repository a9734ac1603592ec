"""`ml/studies/batch_sweep.py`: rates are tuned at the smallest batch alone, and until the best is enclosed."""

import math

import numpy as np
import pytest

from ml.studies.batch_sweep import Plan, clearly_less, sweep, tune


@pytest.mark.parametrize("best", [0.01, 0.32, 5.12])
def test_a_search_goes_on_until_the_best_rate_is_enclosed(best):
    tried = []

    def training(rate, seed):
        tried.append((rate, seed))
        # One seed alone would choose the smallest rate there is.
        return abs(math.log2(rate / best)) + (30 if seed == 7 else -30) * rate

    losses = tune(training, [0.16, 0.32, 0.64], (7, 8))
    assert min(losses, key=losses.get) == pytest.approx(best)
    assert sorted(tried) == [(rate, seed) for rate in losses for seed in (7, 8)], "each once, in order"
    assert min(losses) < 0.9 * best and max(losses) > 1.1 * best


def test_a_sweep_tunes_at_the_smallest_batch_and_counts_divergence_as_the_ceiling():
    calls = []

    def make_training(name, size):
        def training(rate, seed):
            calls.append((name, size, rate, seed))
            if size == 64:
                return math.nan if name == "b" else 1e30
            return abs(math.log2(rate / 0.2)) + 0.1 * seed + size / 100

        return training

    plan = Plan((4, 16, 64), {"a": 0.1, "b": 0.2}, ceiling=9.0, seeds=(1, 2, 3))
    swept = sweep(plan, make_training, tokens=1)
    assert swept.rate("a") == swept.rate("b") == pytest.approx(0.2)
    tuning = [call for call in calls if call[3] in plan.tuning_seeds]
    assert {size for _, size, _, _ in tuning} == {4}
    rest = [call for call in calls if call[3] not in plan.tuning_seeds]
    assert {rate for _, _, rate, _ in rest} == {0.2} and len(rest) == 2 * 3 * 3
    assert swept.losses["a"][16] == pytest.approx((0.26, 0.36, 0.46))
    assert swept.losses["a"][64] == swept.losses["b"][64] == (9.0, 9.0, 9.0)
    np.testing.assert_allclose(swept.lost("a", 16), 0.12)
    np.testing.assert_allclose(swept.lost("a"), [9 - 0.14, 9 - 0.24, 9 - 0.34])
    series = swept.series("a", "A", lost=True)
    assert series.x == (4, 16, 64) and series.y == pytest.approx((0, 0.12, 9 - 0.24))
    assert series.spread == pytest.approx((0, 0, 0.1))
    assert swept.series("a", "A").y == pytest.approx((0.24, 0.36, 9.0))


def test_a_difference_is_clear_beyond_two_standard_errors():
    ours = np.array([1.0, 2.0, 3.0])
    assert clearly_less(ours, ours + 0.1), "paired: the seeds' own spread does not count"
    noise = np.array([-1.0, 0.0, 1.0]) * math.sqrt(3)  # its mean has the standard error 1
    assert clearly_less(ours, ours + noise + 2.01) and not clearly_less(ours, ours + noise + 1.99)
    assert not clearly_less(ours, ours) and not clearly_less(ours + 5, ours)
