import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ml.config import build
from ml.errors import UserError
from ml.optim import ScheduleConfig, StageConfig, make_schedule, scaled_learning_rate


def values(config, steps, *, peak=2.0, total_steps=100, batch_size=8):
    schedule = make_schedule(config, peak, total_steps=total_steps, batch_size=batch_size)
    in_jit = jax.jit(jax.vmap(schedule))(jnp.array(steps))
    one_by_one = [float(schedule(step)) for step in steps]
    np.testing.assert_allclose(in_jit, one_by_one, rtol=1e-5, atol=1e-6 * max(one_by_one))
    return one_by_one


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (ScheduleConfig(kind="constant"), {0: 2.0, 99: 2.0}),
        (ScheduleConfig(kind="constant", warmup_steps=10), {0: 0.0, 1: 0.2, 5: 1.0, 10: 2.0, 99: 2.0}),
        (ScheduleConfig(kind="linear", warmup_steps=20), {0: 0.0, 10: 1.0, 20: 2.0, 60: 1.0, 99: 0.025, 100: 0.0}),
        (ScheduleConfig(kind="linear", warmup_fraction=0.2), {10: 1.0, 20: 2.0, 60: 1.0, 100: 0.0}),
        (ScheduleConfig(kind="linear", end_factor=0.5), {0: 2.0, 50: 1.5, 100: 1.0}),
        (ScheduleConfig(kind="linear", warmup_steps=10, start_factor=0.1), {0: 0.2, 5: 1.1, 10: 2.0}),
        (ScheduleConfig(kind="polynomial", power=2.0), {0: 2.0, 50: 0.5, 90: 0.02, 100: 0.0}),
        (ScheduleConfig(kind="polynomial", power=2.0, end_factor=0.5, warmup_steps=20), {20: 2.0, 60: 1.25, 100: 1.0}),
        (
            ScheduleConfig(kind="cosine", warmup_steps=20, end_factor=0.1),
            {20: 2.0, 40: 0.2 + 1.8 * 0.5 * (1 + math.cos(math.pi / 4)), 60: 1.1, 100: 0.2},
        ),
        (
            ScheduleConfig(kind="wsd", warmup_steps=10, decay_fraction=0.2),
            {10: 2.0, 80: 2.0, 90: 1.0, 95: 0.5, 100: 0.0},
        ),
        (ScheduleConfig(kind="wsd", decay_fraction=0.4, power=2.0, end_factor=0.2), {60: 2.0, 80: 0.8, 100: 0.4}),
    ],
)
def test_values_at_hand_computed_steps(config, expected):
    np.testing.assert_allclose(values(config, list(expected)), list(expected.values()), rtol=1e-5, atol=1e-7)


def test_staged_re_warm_up_follows_the_public_bert_recipe():
    # 64k/32k mixed-batch BERT: peaks 6e-3 and 4e-3, 2000 and 200 steps of warm-up, each stage down to zero.
    config = ScheduleConfig(
        stages=(
            StageConfig(steps=7038, warmup_steps=2000),
            StageConfig(steps=1564, warmup_steps=200, peak_factor=4e-3 / 6e-3),
        )
    )
    steps = [0, 1000, 2000, 2000 + 2519, 7037, 7038, 7038 + 100, 7038 + 200, 7038 + 882, 8602]
    expected = [0, 3e-3, 6e-3, 3e-3, 6e-3 / 5038, 0, 2e-3, 4e-3, 2e-3, 0]
    np.testing.assert_allclose(values(config, steps, peak=6e-3, total_steps=8602), expected, rtol=1e-5, atol=1e-9)


def test_re_warming_starts_from_the_old_minimum():
    config = ScheduleConfig(
        kind="cosine",
        end_factor=0.1,
        stages=(StageConfig(50), StageConfig(50, warmup_steps=10, start_factor=0.1), StageConfig(20, peak_factor=2.0)),
    )
    got = values(config, [0, 25, 50, 55, 60, 80, 100, 110, 120], total_steps=120)
    np.testing.assert_allclose(got, [2.0, 1.1, 0.2, 1.1, 2.0, 1.1, 4.0, 2.2, 0.4], rtol=1e-5)


def test_square_root_scaling_gives_the_lamb_table():
    config = ScheduleConfig(batch_scaling="sqrt", base_batch_size=512)
    batches = [512 * 2**k for k in range(7)]
    rates = [scaled_learning_rate(config, 6.25e-4, batch) for batch in batches]
    np.testing.assert_allclose(rates, [6.25e-4, 8.84e-4, 1.25e-3, 1.77e-3, 2.5e-3, 3.54e-3, 5e-3], rtol=2e-3)
    assert max(values(config, range(101), peak=6.25e-4, batch_size=32768)) == pytest.approx(5e-3)


def test_linear_scaling():
    config = ScheduleConfig(kind="constant", batch_scaling="linear", base_batch_size=256)
    assert values(config, [0], peak=0.1, batch_size=8192) == pytest.approx([3.2])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"kind": "cosin"}, "did you mean 'cosine'"),
        ({"warmup": 3}, "did you mean 'warmup_steps'"),
        ({"kind": "cosine", "power": 2.0}, "power is read with"),
        ({"kind": "constant", "end_factor": 0.1}, "end_factor is read with"),
        ({"kind": "linear", "decay_fraction": 0.2}, "decay_fraction is read with"),
        ({"warmup_steps": 3, "warmup_fraction": 0.1}, "not both"),
        ({"batch_scaling": "sqrt"}, "go together"),
        ({"base_batch_size": 512}, "go together"),
        ({"warmup_steps": 3, "stages": [{"steps": 5}]}, "warmup_steps in each stage"),
        ({"stages": [{"steps": 5, "warmup_steps": 6}]}, r"stages\[0\].*warmup_steps=6"),
        ({"stages": [{"steps": 5, "peek_factor": 6}]}, "did you mean 'peak_factor'"),
    ],
)
def test_bad_settings_say_what_to_mend(setting, message):
    with pytest.raises(UserError, match=message):
        build(ScheduleConfig, setting, "schedule")


def test_a_schedule_that_does_not_fit_the_training_is_refused():
    with pytest.raises(UserError, match=r"add up to 30 steps, but training has 40"):
        make_schedule(ScheduleConfig(stages=(StageConfig(10), StageConfig(20))), 1.0, total_steps=40, batch_size=1)
    with pytest.raises(UserError, match=r"warmup_steps=50 exceeds the 40 steps"):
        make_schedule(ScheduleConfig(warmup_steps=50), 1.0, total_steps=40, batch_size=1)
