"""`ml/studies/zero_memory.py`: the paper's factor, from the placement of every array."""

import pytest
from training_cases import MODELS

from ml.models.cost import parameter_count
from ml.plan.memory import MemoryModel
from ml.studies.zero_memory import MODEL, _experiment, state_bytes, study


def test_sixteen_bytes_a_parameter_and_their_share():
    memory, parameters = MemoryModel(_experiment(MODEL)), parameter_count(MODEL).total
    assert parameters == pytest.approx(7.5e9, rel=0.02)
    whole = state_bytes(memory, "ddp", 64)
    assert whole == pytest.approx(16 * parameters, rel=1e-6) and state_bytes(memory, "zero3", 1) == whole
    # Stage 1 cuts the 12 bytes that live from step to step; the gradients' 4 and the copy's 2 are whole. Stage 2 cuts
    # the gradients, too.
    assert state_bytes(memory, "zero1", 64) == pytest.approx((6 + 12 / 64) * parameters, rel=1e-2)
    assert state_bytes(memory, "zero2", 64) == pytest.approx((2 + 16 / 64) * parameters, rel=1e-2)


def test_the_verdict_follows_the_bytes():
    outcome = study(MODEL, (1, 64), 64)
    assert outcome.holds and outcome.ours.values == pytest.approx((64,), rel=0.01) and not outcome.seeds
    # Where norm scales, which stay whole, are much of the model, its share falls less.
    small = study(MODELS["dense"], (1, 8), 8)
    assert not small.holds and "times less" in small.reason
