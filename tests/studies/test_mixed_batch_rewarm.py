"""`ml/studies/mixed_batch_rewarm.py`: two stages of one text, and a verdict that follows the losses."""

import numpy as np
import pytest

from ml.optim import make_schedule
from ml.studies.byte_text import byte_rows
from ml.studies.mixed_batch_rewarm import SETTINGS, judge, schedule, stages_of

SETTING = SETTINGS["cpu"]


def losses(gain):
    """Re-warming gains ``gain`` at the third rate, which is the best of both variants."""
    noise = np.array([0.0, 0.2, -0.2])
    values = {rate: 2 + abs(i - 2) / 10 + noise for i, rate in enumerate(SETTING.rates)}
    return {
        again: {rate: tuple(map(float, v - gain * again * (i == 2))) for i, (rate, v) in enumerate(values.items())}
        for again in (True, False)
    }


def test_the_verdict():
    outcome = judge(SETTING, losses(0.05))
    assert outcome.holds and outcome.ours.mean == pytest.approx(1.95) and outcome.baseline.mean == pytest.approx(2.0)
    assert "edge" not in outcome.setup
    outcome = judge(SETTING, losses(-0.05))
    assert not outcome.holds and "0.050 lower" in outcome.reason


def test_short_rows_are_cut_from_long_ones_and_the_last_tenth_stays_long():
    (short, long), heldout = stages_of(SETTING)
    length = SETTING.model.max_length
    assert short.rows.shape == (SETTING.rows * 9 // 10, length // 4 + 1) and long.rows.shape == (
        SETTING.rows // 10,
        length + 1,
    )
    assert short.batch_size == 2 * long.batch_size and heldout.shape[1] == length + 1
    whole = byte_rows(-(-len(short.rows) // 4) + len(long.rows), 1, length)[0]
    quarter = length // 4
    np.testing.assert_array_equal(short.rows[0], whole[0, : quarter + 1])
    start = -(-len(short.rows) // 4)
    np.testing.assert_array_equal(short.rows[start + 1], whole[1, quarter : 2 * quarter + 1])
    np.testing.assert_array_equal(long.rows, whole[start:])


def test_the_variants_differ_in_the_second_warm_up_alone():
    stages, _ = stages_of(SETTING)
    first, second = (stage.steps for stage in stages)
    again, once = (
        np.array(
            [
                make_schedule(schedule(stages, flag), 1.0, total_steps=first + second, batch_size=1)(step)
                for step in range(first + second)
            ]
        )
        for flag in (True, False)
    )
    np.testing.assert_array_equal(again[:first], once[:first])
    assert again[0] == again[first] == 0 and once[first] == 1
    assert again.max() == 1 and again[first:].max() == 1 and max(again[-1], once[-1]) < 0.05
