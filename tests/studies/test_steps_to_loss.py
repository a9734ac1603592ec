"""`ml/studies/steps_to_loss.py`: a noisy curve is read where its law says."""

import math

import numpy as np
import pytest

from ml.studies.steps_to_loss import smoothed, steps_to


def test_steps_are_read_off_a_noisy_power_law():
    steps = np.arange(1, 3001)
    losses = 8 * steps**-0.2 * np.exp(0.05 * np.random.default_rng(0).normal(size=3000))
    for target in (2.5, 2.0):
        assert steps_to(losses, target) == pytest.approx((8 / target) ** 5, rel=0.06)
    assert steps_to(losses, 1.0) == math.inf
    assert steps_to(np.full(10, 1.0), 2.0) == 1


def test_smoothing_shifts_nothing():
    line = np.arange(200.0)
    np.testing.assert_allclose(smoothed(line), line, atol=1e-9)
