"""`ml/studies/loss_curve.py`: the verdict follows the curves."""

import dataclasses

import numpy as np
import pytest

from ml.plan.loss_curve import Curve, LossCurve
from ml.plan.step_law import non_embedding_parameters
from ml.studies.byte_training import byte_model
from ml.studies.loss_curve import SETTINGS, Found, judge, study

SETTING = SETTINGS["cpu"]
LAW = LossCurve(a_n=0.1, n_c=1e7, a_b=0.2, b_0=3e5, a_s=0.6, s_c=30.0)


def found(bend=1.0):
    """Curves of known constants; the large model's losses are off by a factor."""

    def curve(width, size, factor=1.0):
        parameters = non_embedding_parameters(byte_model(SETTING.layers, width, 2, SETTING.length))
        batch, steps = float(size * SETTING.length), tuple(np.geomspace(60, 1000, 12).tolist())
        return Curve(parameters, batch, steps, tuple((factor * LAW.predict(parameters, batch, steps)).tolist()))

    small = tuple(curve(width, size) for width in SETTING.widths for size in SETTING.steps)
    large = tuple(curve(SETTING.held_out, size, bend) for size in SETTING.held_out_batches)
    seeds = SETTING.seeds
    return Found(dict.fromkeys(seeds, small), dict.fromkeys(seeds, large), {(12, 4): 0.01})


def test_a_prediction_within_five_percent_holds():
    outcome = judge(SETTING, found(1.02))
    assert outcome.holds and outcome.ours.values == pytest.approx((1.96, 1.96, 1.96), abs=0.2)
    assert outcome.details["constants"]["1"]["a_s"] == pytest.approx(0.6, rel=0.02)
    assert min(outcome.details["control_error_percent"]) > 5, "without a law of size it would not hold"
    off = judge(SETTING, found(1.07))
    assert not off.holds and off.reason == "the largest error is 6.5 percent"


@pytest.mark.slow
def test_a_whole_study_in_small():
    small = dataclasses.replace(
        SETTING,
        length=16,
        widths=(8, 16),
        held_out=24,
        steps={8: 300, 32: 200},
        held_out_batches=(32,),
        rates=(0.01, 0.02),
        first_step=30,
    )
    outcome = study(small)
    assert all(0 < error < 50 for error in outcome.ours.values) and len(outcome.panels[0].series) == 3
