"""`ml/studies/outcome.py`: an outcome cannot say what its numbers do not."""

import math

import numpy as np
import pytest
from outcome_cases import outcome

from ml.studies.outcome import Measured, Panel, Series, related


def test_the_spread_is_that_of_a_sample():
    side = Measured("ours", (1.0, 2.0, 4.5))
    assert side.mean == pytest.approx(2.5) and side.spread == pytest.approx(np.std(side.values, ddof=1))
    assert Measured("published", (0.3,)).spread == 0


@pytest.mark.parametrize(
    ("ours", "relation", "baseline", "tolerance", "answer"),
    [
        (1.0, "<", 2.0, 0.0, True),
        (2.0, "<", 2.0, 0.0, False),
        (2.0, ">", 1.0, 0.0, True),
        (1.0, ">", 2.0, 0.0, False),
        (1.049, "~", 1.0, 0.05, True),
        (1.0, "~", 1.049, 0.05, True),
        (1.051, "~", 1.0, 0.05, False),
        (1.0, "~", 1.051, 0.05, False),
        (-1.01, "~", -1.0, 0.05, True),
        (-1.0, "~", 1.0, 5.0, False),
        (0.0, "~", 0.0, 0.05, True),
        (0.0, "~", 1.0, 0.05, False),
    ],
)
def test_relations(ours, relation, baseline, tolerance, answer):
    assert related(ours, relation, baseline, tolerance) is answer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"relation": ">"}, "holds, but not"),
        ({"holds": False}, "give a reason"),
        ({"reason": "but it holds"}, "give a reason"),
        ({"seeds": (1, 2)}, "3 are the least"),
        ({"seeds": ()}, "3 values, but 0 seeds"),
        ({"ours": Measured("ours", (1.0, 1.1))}, "2 values, but 3 seeds"),
        ({"relation": "~"}, "tolerance"),
        ({"tolerance": 0.1}, "tolerance"),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        outcome(**changes)


def test_a_published_number_needs_no_seeds_and_a_claim_may_fail():
    assert outcome(baseline=Measured("published", (3.0,))).holds
    assert not outcome(relation=">", holds=False, reason="too small").holds
    assert not outcome(holds=False, reason="within the noise").holds, "a study may demand more than the relation"


def test_numbers_are_finite_and_series_match():
    with pytest.raises(ValueError, match="diverged"):
        Measured("ours", (1.0, math.nan))
    with pytest.raises(ValueError, match="one length"):
        Series("ours", (1.0, 2.0), (1.0,))
    with pytest.raises(ValueError, match="not finite"):
        Series("ours", (1.0,), (math.inf,))
    with pytest.raises(ValueError, match="no series"):
        Panel("x", "y", ())
