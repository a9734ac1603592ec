"""`ml/studies/byte_training.py` and its text: the shipped step, in one program for all rates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ml.errors import UserError
from ml.models import Transformer, init_params, logical_axes
from ml.optim import OptimizerConfig, ScheduleConfig, make_optimizer
from ml.studies.byte_text import VOCAB_SIZE, byte_rows
from ml.studies.byte_training import Stage, byte_model, make_byte_curve, make_byte_training


def test_rows_are_bytes_of_different_files():
    rows, heldout = byte_rows(64, 32, 31)
    assert rows.shape == (64, 32) and heldout.shape == (32, 32) and rows.dtype == np.int32
    assert rows.min() >= 0 and rows.max() < VOCAB_SIZE
    text = bytes(rows.reshape(-1).tolist()).decode()
    assert "import" in text or "def " in text
    again, _ = byte_rows(16, 32, 31)
    np.testing.assert_array_equal(again, rows[:16])
    with pytest.raises(UserError, match="bytes too short"):
        byte_rows(10**9, 1, 31)


def test_a_training_is_what_the_optimizer_does_at_that_rate(quick_compilation):
    """Against a loop of its own: plain autodiff of the whole logits, and the optimizer built with the real rate."""
    config, rate, seed = byte_model(1, 8, 2, 7), 0.03, 5
    rows, heldout = byte_rows(13, 5, 7)
    later = byte_rows(5, 1, 7)[0][:, ::-1]
    schedule = ScheduleConfig(kind="linear", warmup_steps=1, batch_scaling="sqrt", base_batch_size=1)
    unit = OptimizerConfig("lamb", learning_rate=1.0, weight_decay=0.01)
    train = make_byte_training(config, unit, schedule, [Stage(rows, 4), Stage(later, 4)], heldout)

    model = Transformer(config)

    @jax.jit
    def loss(params, part):
        logits = model.apply({"params": params}, part[:, :-1], method="forward")
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), part[:, 1:, None], -1).mean()

    real = OptimizerConfig("lamb", learning_rate=rate, weight_decay=0.01)
    tx, _ = make_optimizer(real, schedule, total_steps=4, batch_size=4, axes=logical_axes(config))
    params, order = jax.jit(lambda: init_params(model, jax.random.key(seed)))(), np.random.default_rng(seed)
    first, state = float(loss(params, heldout)), tx.init(params)

    @jax.jit
    def step(params, state, part):
        updates, state = tx.update(jax.grad(loss)(params, part), state, params)
        return jax.tree.map(jnp.add, params, updates), state

    parts = list(order.permutation(rows)[:12].reshape(3, 4, 8))
    for part in [*parts, order.permutation(later)[:4]]:
        params, state = step(params, state, part)
    expected = float(loss(params, heldout))
    assert abs(first - expected) > 0.01
    assert train(rate, seed) == pytest.approx(expected, abs=0.01 * abs(first - expected))


def test_the_rate_is_an_argument():
    with pytest.raises(ValueError, match="must be 1"):
        optimizer = OptimizerConfig("lamb", learning_rate=0.1)
        rows, heldout = byte_rows(4, 4, 7)
        make_byte_training(byte_model(1, 8, 2, 7), optimizer, ScheduleConfig(), [Stage(rows, 4)], heldout)


def test_a_curve_is_of_the_same_pass(quick_compilation):
    """Its losses are those of the rows in the order that the seed draws, however a batch is cut."""
    config, seed = byte_model(1, 8, 2, 7), 5
    rows, _ = byte_rows(12, 5, 7)
    unit, schedule = OptimizerConfig("adamw", learning_rate=1.0), ScheduleConfig(kind="constant")
    curve = make_byte_curve(config, unit, schedule, Stage(rows, 4), microbatches=2, noise_scale=True)
    metrics = curve(0.01, seed)
    assert metrics["loss"].shape == metrics["noise_variance"].shape == (3,) and (metrics["noise_variance"] > 0).all()

    model = Transformer(config)
    first = np.random.default_rng(seed).permutation(rows)[:4]
    logits = model.apply({"params": init_params(model, jax.random.key(seed))}, first[:, :-1], method="forward")
    expected = -jnp.take_along_axis(jax.nn.log_softmax(logits), first[:, 1:, None], -1).mean()
    assert metrics["loss"][0] == pytest.approx(float(expected), rel=1e-4)
    assert metrics["loss"][2] < metrics["loss"][0]
