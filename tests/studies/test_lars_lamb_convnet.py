"""`ml/studies/lars_lamb_convnet.py`: the verdict follows the losses."""

import dataclasses

import pytest

from ml.studies.batch_sweep import Sweep
from ml.studies.digits_training import digits, digits_model
from ml.studies.lars_lamb_convnet import OPTIMIZERS, SETTINGS, TOLERANCE, judge, study

SETTING = SETTINGS["cpu"]
LAST = SETTING.plan.batch_sizes[-1]


def swept(**at_last):
    """A sweep that ends at these losses."""
    losses = {
        name: {
            size: tuple((at_last[name] if size == LAST else 0.1) + n for n in (0.0, 0.01, -0.01))
            for size in SETTING.plan.batch_sizes
        }
        for name in OPTIMIZERS
    }
    return Sweep(SETTING.plan, losses, {name: {0.1: 0.2} for name in OPTIMIZERS})


def test_about_equal_is_either_way_and_no_further():
    for lamb, lars in ((0.2, 0.24), (0.24, 0.2)):
        outcome = judge(SETTING, swept(lamb=lamb, lars=lars, sgd=0.9))
        assert outcome.holds and (outcome.relation, outcome.tolerance) == ("~", TOLERANCE)
        assert outcome.ours.mean == pytest.approx(lamb) and outcome.baseline.mean == pytest.approx(lars)
    outcome = judge(SETTING, swept(lamb=0.2, lars=0.3, sgd=0.2))
    assert not outcome.holds and outcome.reason == "LAMB ends at 0.200, LARS at 0.300, 50% above it"


def test_settings_grow_the_batch_16x_and_leave_steps_after_warm_up():
    images = len(digits()[0]["images"])
    for setting in SETTINGS.values():
        sizes = setting.plan.batch_sizes
        assert sizes[-1] >= 16 * sizes[0] and len(setting.plan.seeds) >= 3
        assert images * setting.epochs // sizes[-1] > 3 * setting.warmup_steps


@pytest.mark.slow
def test_a_whole_study_in_small():
    plan = dataclasses.replace(SETTING.plan, batch_sizes=(64, 256), tuning_seeds=(11,), seeds=(1, 2, 3))
    outcome = study(dataclasses.replace(SETTING, model=digits_model(4, (1,)), epochs=4, plan=plan))
    losses = outcome.details["heldout_loss"]
    assert all(0.01 < loss < 2.35 for name in OPTIMIZERS for loss in losses[name]["64"])
