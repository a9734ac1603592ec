"""Every optimizer leaves the router's bias where the load put it, or is refused beside one."""

import jax
import numpy as np
import optax
import pytest

from ml.errors import UserError
from ml.optim import NO_OUTSIDE_MOVES, OPTIMIZERS, OptimizerConfig, ScheduleConfig, make_optimizer

AXES = {"layers": {"moe": {"router": {"kernel": ("layers", "embed", "expert_logits"), "bias": ("layers", "experts")}}}}


def transform(name):
    config = OptimizerConfig(name, 0.1, weight_decay=0.1, clip_norm=0.5)
    return make_optimizer(config, ScheduleConfig(kind="constant"), total_steps=9, batch_size=4, axes=AXES)[0]


def tree(rng, bias):
    kernel = rng.normal(size=(2, 4, 3)).astype(np.float32)
    return {"layers": {"moe": {"router": {"kernel": kernel, "bias": bias}}}}


def bias_of(params):
    return params["layers"]["moe"]["router"]["bias"]


@pytest.mark.parametrize("name", sorted(OPTIMIZERS.keys() - NO_OUTSIDE_MOVES))
def test_a_zero_gradient_moves_nothing_however_the_bias_was_moved(name):
    rng = np.random.default_rng(0)
    params = tree(rng, rng.normal(size=(2, 3)).astype(np.float32))
    tx = transform(name)
    state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
    for _ in range(3):
        before = params
        updates, state = update(tree(rng, np.zeros((2, 3), np.float32)), state, params)
        params = jax.device_get(optax.apply_updates(params, updates))
        np.testing.assert_array_equal(bias_of(params), bias_of(before))
        params["layers"]["moe"]["router"]["bias"] = bias_of(params) + 0.1 * rng.normal(size=(2, 3)).astype(np.float32)


@pytest.mark.parametrize("name", sorted(NO_OUTSIDE_MOVES))
def test_one_that_would_move_it_is_refused(name):
    with pytest.raises(UserError, match=rf"optimizer.name={name} .* model.moe.bias_update_rate=0"):
        transform(name)
