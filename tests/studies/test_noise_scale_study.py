"""`ml/studies/noise_scale.py`: the verdict follows the runs."""

import dataclasses

import pytest

from ml.studies.byte_training import byte_model
from ml.studies.noise_scale import SETTINGS, Found, judge, study

SETTING = SETTINGS["cpu"]


def found(critical, noise):
    """Runs of 50 steps at least that follow the hyperbola, with a spread over seeds."""
    steps = {
        size: tuple(50 * (1 + critical * f / (size * SETTING.model.max_length)) for f in (0.9, 1.0, 1.1))
        for size in SETTING.steps
    }
    return Found(steps, dict.fromkeys(SETTING.steps, 0.01), *[tuple(noise * f for f in (0.8, 1.0, 1.2))] * 2)


def test_within_a_factor_of_two_it_holds():
    outcome = judge(SETTING, found(3000, 4800))
    assert outcome.holds and outcome.baseline.values == pytest.approx((2700, 3000, 3300), rel=0.02)
    assert outcome.ours.mean == pytest.approx(4800) and outcome.seeds == SETTING.seeds
    assert not judge(SETTING, found(3000, 7000)).holds
    assert "2.3 times the critical batch" in judge(SETTING, found(3000, 7000)).reason
    assert not judge(SETTING, found(3000, 1400)).holds


@pytest.mark.slow
def test_a_whole_study_in_small():
    small = dataclasses.replace(
        SETTING, model=byte_model(1, 16, 2, 16), target=3.2, steps={4: 800, 32: 300, 256: 150}, probe_batch=256
    )
    outcome = study(small)
    assert all(value > 0 for value in outcome.baseline.values + outcome.ours.values)
    steps = outcome.details["steps_to_loss"]
    assert min(steps["4"]) > max(steps["256"]), "a larger batch needs fewer steps"
