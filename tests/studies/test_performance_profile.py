"""`ml/studies/performance_profile.py` against a profile drawn by hand, and its area by numerical integration."""

import math

import numpy as np
import pytest

from ml.studies.performance_profile import UP_TO, profile, ratios, scores

TIMES = {
    "fast": np.array([10.0, 30.0, math.inf, math.inf]),
    "steady": np.array([20.0, 20.0, 50.0, math.inf]),
    "slow": np.array([41.0, 81.0, 75.0, math.inf]),
}


def test_the_profile():
    found = ratios(TIMES)
    np.testing.assert_allclose(found["fast"], [1, 1.5, math.inf, math.inf])
    np.testing.assert_allclose(found["steady"], [2, 1, 1, math.inf])
    tau = np.array([1.0, 1.5, 2.0, 4.0])
    np.testing.assert_allclose(profile(found["fast"], tau), [0.25, 0.5, 0.5, 0.5])
    np.testing.assert_allclose(profile(found["steady"], tau), [0.5, 0.5, 0.75, 0.75])


def test_the_score_is_the_area_under_the_profile():
    tau = np.linspace(1, UP_TO, 30_001)
    found, areas = ratios(TIMES), scores(TIMES)
    for name, ratio in found.items():
        area = np.trapezoid(profile(ratio, tau), tau) / (UP_TO - 1)
        assert areas[name] == pytest.approx(area, abs=1e-3)
    # Of two beyond four times the best nothing counts, and of a problem that nobody solved.
    assert areas["slow"] == pytest.approx((4 - 1.5) / 3 / 4)
