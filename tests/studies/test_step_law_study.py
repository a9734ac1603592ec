"""`ml/studies/step_law.py`: the verdict follows the losses."""

import dataclasses
import math

import pytest

from ml.studies.step_law import SETTINGS, best_batch, judge, study

SETTING = SETTINGS["cpu"]


def losses(exponents):
    """Parabolas whose lowest points grow with the rows, by width; seeds differ a little."""

    def loss(width, rows, batch, shift):
        best = 3 * (rows / SETTING.rows[0]) ** exponents[width] * shift
        return 2 + 0.02 * math.log(batch / best) ** 2

    return {
        (width, rows): {batch: tuple(loss(width, rows, batch, s) for s in (0.9, 1.0, 1.1)) for batch in batches}
        for width in SETTING.widths
        for rows, batches in SETTING.batches.items()
    }


def test_a_batch_that_grows_at_every_width_holds():
    first, second = SETTING.widths
    outcome = judge(SETTING, losses({first: 0.5, second: 0.4}))
    assert outcome.holds and outcome.ours.values == pytest.approx((0.4,) * 3) and str(second) in outcome.ours.name
    assert len(outcome.panels) == 3 and outcome.details["exponents"][str(first)] == pytest.approx([0.5] * 3)
    failed = judge(SETTING, losses({first: 0.5, second: -0.1}))
    assert not failed.holds and f"width {second}: -0." in failed.reason


def test_the_lowest_point_lies_between_the_batches_or_on_the_edge():
    assert best_batch({2: 1.3, 4: 1.1, 8: 1.1, 16: 1.3}) == pytest.approx(2**2.5)
    assert best_batch({2: 1.0, 4: 1.1, 8: 1.2}) == 2


def test_a_cell_has_room_on_both_sides():
    for setting in SETTINGS.values():
        assert set(setting.batches) == set(setting.rows)
        assert all(rows // max(sizes) >= 16 for rows, sizes in setting.batches.items())


@pytest.mark.slow
def test_a_whole_study_in_small():
    small = dataclasses.replace(
        SETTING, widths=(8, 16), length=16, rows=(64, 256), batches={64: (2, 4, 8), 256: (2, 4, 8)}, heldout_rows=64
    )
    outcome = study(small)
    assert set(outcome.details["exponents"]) == {"8", "16"}
