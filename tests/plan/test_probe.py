"""The probe: its numbers from a run's rows, and the experiment it trains."""

import dataclasses

import numpy as np
import pytest
from planned_cases import experiment

from ml.errors import UserError
from ml.optim import ScheduleConfig
from ml.plan.probe import measure_noise_scale, probe_config, summarized


def rows(variance, signal, spread=0.3, count=50):
    rng = np.random.default_rng(0)
    return [
        {
            "step": step,
            "noise_variance": variance * (1 + spread * rng.normal()),
            "noise_signal": signal * (1 + 2 * spread * rng.normal()),
            "loss": 3.0,
            "tokens": 100,
        }
        for step in range(count)
    ]


def test_the_ratio_of_means_and_how_sure_it_is():
    found = summarized(rows(2.0, 0.001), 100)
    assert found.low < 2000 < found.high and found.tokens == pytest.approx(2000, rel=0.3)
    assert found.low < found.tokens < found.high < 2 * found.low
    assert (found.steps, found.loss, found.batch_tokens) == (100, 3.0, 100)
    less_sure = summarized(rows(2.0, 0.001, spread=0.6), 100)
    assert less_sure.high / less_sure.low > 1.3 * found.high / found.low


def test_steps_that_were_not_finite_are_left_out():
    spoiled = rows(2.0, 0.001)
    spoiled[7]["noise_signal"] = float("nan")
    assert summarized(spoiled, 100).tokens == pytest.approx(2000, rel=0.3)


def test_noise_that_drowns_the_gradient_is_said():
    with pytest.raises(UserError, match="drowns the gradient in 50 steps; raise --probe_steps"):
        summarized(rows(2.0, -0.001), 100)


def test_the_probe_changes_nothing_that_the_noise_depends_on():
    config = dataclasses.replace(
        experiment(ema=0.9), schedule=ScheduleConfig(kind="cosine", warmup_fraction=0.2, end_factor=0.1)
    )
    probe = probe_config(config, 40, shards=2)
    assert probe.train.noise_scale and probe.train.microbatches == 2 and probe.train.steps == 40
    assert probe.schedule == ScheduleConfig(kind="constant", warmup_steps=20)
    for name in ("model", "optimizer", "mesh", "seed"):
        assert getattr(probe, name) == getattr(config, name)
    assert probe.train.batch_size == config.train.batch_size and probe.data.heldout_fraction == 0
    with pytest.raises(UserError, match=r"batch_size=16 is not a multiple of 2 microbatches x 16 batch shards"):
        probe_config(config, 40, shards=16)


def test_too_short_a_probe_is_refused(tmp_path):
    with pytest.raises(UserError, match="--probe_steps=4 is too few"):
        measure_noise_scale(experiment(), tmp_path, steps=4)
