"""`ml/studies/learning_rate_free.py`: settings within the search space, steps to targets, a verdict from the times."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from ml.optim import OptimizerConfig, ScheduleConfig
from ml.studies.learning_rate_free import NAMES, SETTINGS, candidates, judge, steps_to_targets
from ml.studies.workloads import Mlp, Workload, make_training

SETTING = dataclasses.replace(SETTINGS["cpu"], steps=100, every=10)
PROBLEMS = ("one", "two")


def test_candidates():
    for name in NAMES:
        found = candidates(name, 8)
        published = name != "nadamw"
        assert len(found) == 8 + published and len({str(recipe) for recipe in found}) == len(found)
        if published:
            assert found[0].optimizer == OptimizerConfig(name, 1.0) and found[0].schedule.kind == "constant"
        rates = [recipe.optimizer.learning_rate for recipe in found]
        assert (min(rates) == max(rates) == 1.0) if published else (1e-4 <= min(rates) < 1e-3 < max(rates) <= 1e-2)
        assert all(0 <= recipe.schedule.warmup_fraction <= 0.2 for recipe in found)


def test_steps_to_targets():
    curves = np.array([[[3.0, 2.0, 1.0], [3.0, math.inf, 2.5]], [[1.0, 5.0, 5.0], [9.0, 9.0, 8.0]]])
    np.testing.assert_array_equal(steps_to_targets(curves, np.array([2.0, 8.0]), 10), [[20, math.inf], [10, 30]])


def times(gain):
    """Prodigy's second recipe takes ``gain`` times NAdamW's steps; everyone else solves little."""
    noise = np.linspace(1, 1.02, len(SETTING.tuning_seeds + SETTING.seeds))
    rival = 40 * np.stack([noise, noise])
    never = np.full_like(rival, math.inf)
    recipes = {name: candidates(name, 1) for name in NAMES}
    return recipes, {
        name: [rival] if name == "nadamw" else [never, rival * gain if name == "prodigy" else never] for name in NAMES
    }


@pytest.mark.parametrize(("gain", "holds"), [(1.3, True), (0.8, False), (3.0, False)])
def test_the_verdict(gain, holds):
    outcome = judge(SETTING, PROBLEMS, np.array([1.0, 2.0]), *times(gain))
    assert outcome.holds == holds and outcome.ours.name == "Prodigy"
    assert outcome.baseline.mean == pytest.approx(1.0 if gain > 1 else (4 - 1 / gain) / 3)
    assert outcome.ours.mean == pytest.approx(1.0 if gain < 1 else (4 - gain) / 3)
    assert outcome.details["scores"]["Prodigy, published"] == [0.0] * 3
    assert ("none the worse" in outcome.reason, "far below" in outcome.reason) == (gain < 1, gain > 2)


def test_a_training_lowers_the_loss_and_a_seed_gives_it_again():
    inputs = np.random.default_rng(0).normal(size=(256, 4)).astype(np.float32)
    examples = jnp.asarray(inputs), jnp.asarray((inputs.sum(axis=1) > 0).astype(np.int32))
    problem = Workload("sign of a sum", Mlp((8, 2)), True, examples, examples, 32)
    recipe = OptimizerConfig("nadamw", 0.05), ScheduleConfig(kind="cosine")
    training = make_training(problem, *recipe, steps=40, every=20)
    curves = training((1, 2, 1))
    assert curves.shape == (3, 2) and (curves[:, -1] < 0.3).all()
    np.testing.assert_allclose(curves[0], curves[2], rtol=1e-5)
    assert abs(curves[0] - curves[1]).max() > 1e-4
