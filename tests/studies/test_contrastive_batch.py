"""`ml/studies/contrastive_batch.py`: what is trained, and a verdict that follows the shares."""

import dataclasses

import numpy as np
import pytest

from ml.studies.contrastive_batch import SETTINGS, Found, judge, make_training

SETTING = SETTINGS["cpu"]


def found(exact, blocks):
    noise = np.array([0.0, 0.01, -0.01, 0.005])
    shares = {size: tuple(mean + noise) for size, mean in zip(SETTING.batch_sizes, exact, strict=True)}
    return Found(shares, tuple(blocks + 1.5 * noise), dict.fromkeys((*SETTING.batch_sizes, 0), 0.001))


def test_the_verdict():
    outcome = judge(SETTING, found((0.2, 0.3, 0.4, 0.5), 0.4))
    assert outcome.holds and outcome.ours.mean == pytest.approx(0.5, abs=0.01)
    falls = judge(SETTING, found((0.2, 0.3, 0.51, 0.5), 0.4))
    assert not falls.holds and "does not rise" in falls.reason and "blocks" not in falls.reason
    same = judge(SETTING, found((0.2, 0.3, 0.4, 0.5), 0.499))
    assert not same.holds and "blocks of 16 lose 0.00" in same.reason


@pytest.mark.slow
def test_pairs_are_found_more_often_than_by_chance_and_blocks_are_another_training():
    setting = dataclasses.replace(SETTING, steps=40, hidden=32, part=16)
    exact, blocks = (make_training(setting, 64, block)(0.004, 1) for block in (None, 8))
    assert exact > 10 / setting.test_pairs and exact != blocks
