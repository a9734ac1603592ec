"""`ml/studies/lamb_batch_size.py`: the verdict follows the losses."""

import dataclasses

import pytest

from ml.studies.batch_sweep import Sweep
from ml.studies.byte_training import byte_model
from ml.studies.lamb_batch_size import OPTIMIZERS, SETTINGS, judge, study

SETTING = SETTINGS["cpu"]
FIRST, LAST = SETTING.plan.batch_sizes[0], SETTING.plan.batch_sizes[-1]


def swept(**lost):
    """A sweep in which optimizers lose this much, by seed."""
    noise = (0.0, 0.01, -0.01, 0.0)
    losses = {
        name: {
            size: tuple(2 + n + (lost[name] if size == LAST else 0) for n in noise) for size in SETTING.plan.batch_sizes
        }
        for name in OPTIMIZERS
    }
    return Sweep(SETTING.plan, losses, {name: {0.1: 2.0} for name in OPTIMIZERS})


def test_the_claim_holds_against_both_or_not_at_all():
    outcome = judge(SETTING, swept(lamb=0.5, adamw=0.7, lars=0.6))
    assert outcome.holds and outcome.baseline.name == "LARS" and outcome.baseline.mean == pytest.approx(0.6)
    assert outcome.ours.values == pytest.approx((0.5,) * 4) and outcome.seeds == SETTING.plan.seeds
    outcome = judge(SETTING, swept(lamb=0.5, adamw=0.7, lars=0.4))
    assert not outcome.holds and outcome.baseline.name == "LARS"
    assert outcome.reason == (
        "LARS loses less than LAMB (0.40 against 0.50): it goes from 2.00 to 2.40, LAMB from 2.00 to 2.50"
    )
    assert judge(SETTING, swept(lamb=0.5, adamw=0.5, lars=0.7)).reason.startswith("AdamW cannot be told from LAMB")


def test_settings_grow_the_batch_16x_and_fit_the_rows():
    for setting in SETTINGS.values():
        sizes = setting.plan.batch_sizes
        assert sizes[-1] >= 16 * sizes[0] and all(setting.rows % size == 0 for size in sizes)
        assert len(setting.plan.seeds) >= 3 and not set(setting.plan.tuning_seeds) & set(setting.plan.seeds)
        assert setting.rows // sizes[-1] > 3 * setting.warmup_steps


@pytest.mark.slow
def test_a_whole_study_in_small():
    plan = dataclasses.replace(SETTING.plan, batch_sizes=(2, 32), tuning_seeds=(11,))
    small = dataclasses.replace(
        SETTING, model=byte_model(1, 16, 2, 16), rows=1024, heldout_rows=128, warmup_steps=4, plan=plan
    )
    outcome = study(small)
    losses = outcome.details["heldout_loss"]
    assert set(losses) == set(OPTIMIZERS)
    for name in OPTIMIZERS:
        assert all(2 < loss < 4.8 for loss in losses[name]["2"]), "better than a guess, worse than a large model"
        assert min(losses[name]["32"]) > max(losses[name]["2"]), "32 steps teach less than 512"
    assert "16x" in outcome.claim and len(outcome.panels) == 2
