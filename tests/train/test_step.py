"""The train step: its gradient, that cutting the batch changes nothing, and what a value that is not finite does."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_cases import LENGTH, MODELS, initial_params, ragged_batch

import ml.train.objective
import ml.train.step
from ml.models import SelfAttention, Transformer, logical_axes
from ml.optim import OptimizerConfig, ScheduleConfig, make_optimizer
from ml.train.config import TrainConfig
from ml.train.objective import make_loss
from ml.train.state import TrainState
from ml.train.step import make_train_step

pytestmark = pytest.mark.usefixtures("quick_compilation")
ROWS = 8
# Plain gradient descent with rate 1: the update is the gradient, and no division hides its size.
GRADIENT = OptimizerConfig("sgd", 1.0, options={"momentum": 0.0})
RELATIVE = 1e-4


def setting(model, optimizer=GRADIENT, schedule=ScheduleConfig(), **train):
    """The jitted step and a fresh state."""
    config = TrainConfig(**{"steps": 10, "batch_size": ROWS, **train})
    tx, rate = make_optimizer(optimizer, schedule, total_steps=10, batch_size=ROWS, axes=logical_axes(model))
    params = jax.tree.map(jnp.asarray, initial_params(model))
    ema = jax.tree.map(jnp.zeros_like, params) if config.ema else None
    zero = jnp.zeros((), jnp.int32)
    step = jax.jit(make_train_step(Transformer(model), tx, rate, config))
    return step, TrainState(zero, params, tx.init(params), ema, zero)


@functools.cache
def lamb_setting():
    """With everything that a skipped step could spoil."""
    return setting(MODELS["dense"], OptimizerConfig("lamb", 0.1, clip_norm=1.0), ema=0.75, microbatches=2)


def cut(batch, microbatches):
    return {name: jnp.asarray(x.reshape(microbatches, -1, LENGTH)) for name, x in batch.items()}


def change(before, after):
    return jax.tree.map(lambda a, b: np.asarray(b, np.float64) - np.asarray(a, np.float64), before, after)


def norm(tree):
    return float(np.sqrt(sum(np.sum(np.square(np.asarray(x, np.float64))) for x in jax.tree.leaves(tree))))


def distance(got, expected):
    """The largest difference in any leaf, as a share of the leaf's largest entry.

    A leaf that is a millionth of the others is zero but for rounding (the bias of keys: no softmax feels it).
    """
    largest = max(np.abs(np.asarray(x)).max() for x in jax.tree.leaves(expected))

    def of(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return np.abs(a - b).max() / max(np.abs(b).max(), 1e-3 * largest)

    return max(jax.tree.leaves(jax.tree.map(of, got, expected)))


def plain_loss(model, config, params, batch):
    """Sum of the objective over a batch ``[rows, length]``, as a textbook has it: no chunks, no gradient of its own."""
    hidden, _, stats = model.apply(
        {"params": params},
        batch["tokens"],
        SelfAttention(batch["segment_ids"], "reference"),
        batch["positions"],
        valid=batch["segment_ids"] > 0,
    )
    logits = model.apply({"params": params}, hidden, method="logits")
    log_p = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
    log_z = jax.nn.logsumexp(logits, axis=-1)
    weight = model.config.moe.aux_loss_weight if model.config.moe else 0.0
    mask = batch["loss_mask"]
    return jnp.sum((nll + config.z_loss * log_z**2 + weight * stats.balance) * mask)


@pytest.mark.sweep("moe")
@pytest.mark.parametrize("name", ["moe", "gemma", "gpt2"])
def test_the_update_is_the_gradient_of_the_textbook_loss_per_token(name):
    step, state = setting(MODELS[name], z_loss=0.05, loss_chunk=5, microbatches=2)
    batch = cut(ragged_batch(ROWS), 2)
    model, config = Transformer(MODELS[name]), TrainConfig(z_loss=0.05)

    def whole(params):
        parts = [plain_loss(model, config, params, jax.tree.map(lambda x, i=i: x[i], batch)) for i in range(2)]
        return sum(parts) / batch["loss_mask"].sum()

    objective, expected = jax.jit(jax.value_and_grad(whole))(state.params)
    after, metrics = step(state, batch)
    assert distance(change(after.params, state.params), expected) < RELATIVE
    np.testing.assert_allclose(metrics["gradient_norm"], norm(expected), rtol=1e-5)
    np.testing.assert_allclose(metrics["objective"], objective, rtol=1e-5)
    assert metrics["loss"] < metrics["objective"], "the reported loss is the cross-entropy alone"
    assert metrics["tokens"] == batch["loss_mask"].sum()


def test_cutting_the_batch_changes_nothing():
    batch = ragged_batch(ROWS)
    counted = batch["loss_mask"].sum(axis=1)
    assert counted[0] >= 4 * counted[-1] > 0, "rows are meant to differ widely in what counts"
    updates = {}
    for microbatches in (1, 2, 8):
        step, state = setting(MODELS["dense"], microbatches=microbatches, z_loss=0.01)
        after, metrics = step(state, cut(batch, microbatches))
        updates[microbatches] = change(state.params, after.params), metrics
    for microbatches in (2, 8):
        assert distance(updates[microbatches][0], updates[1][0]) < RELATIVE
        for scalar in ("loss", "objective", "tokens", "gradient_norm", "parameter_norm"):
            np.testing.assert_allclose(updates[microbatches][1][scalar], updates[1][1][scalar], rtol=1e-5)

    # The usual mistake is far outside of that tolerance: averaging what each microbatch averaged by itself.
    gradient = jax.jit(jax.grad(make_loss(Transformer(MODELS["dense"]), TrainConfig(z_loss=0.01)), has_aux=True))
    parts = cut(batch, 8)
    for i in range(8):
        part = jax.tree.map(lambda x, i=i: x[i], parts)
        own = jax.tree.map(lambda g, n=part["loss_mask"].sum(): -g / n / 8, gradient(state.params, part)[0])
        mean = own if i == 0 else jax.tree.map(jnp.add, mean, own)
    assert distance(mean, updates[1][0]) > 100 * RELATIVE


@pytest.mark.parametrize("name", ["gemma", "gpt2"])
def test_packed_documents_do_not_see_each_other(name):
    packed = ragged_batch(2)
    documents = [(row, number) for row in range(2) for number in range(1, packed["segment_ids"][row].max() + 1)]
    assert len(documents) >= 4
    apart = {key: np.zeros((len(documents), LENGTH), x.dtype) for key, x in packed.items()}
    together = {key: np.zeros_like(x) for key, x in apart.items()}  # of the same shape, the rest is padding
    for key, x in packed.items():
        together[key][:2] = x
        for i, (row, number) in enumerate(documents):
            inside = packed["segment_ids"][row] == number
            apart[key][i, : inside.sum()] = x[row][inside]
    loss = jax.jit(make_loss(Transformer(MODELS[name]), TrainConfig()))
    params = initial_params(MODELS[name])
    np.testing.assert_allclose(loss(params, together)[1]["loss"], loss(params, apart)[1]["loss"], rtol=1e-5)


def test_clipping_shortens_the_update_and_not_the_report():
    step, state = setting(MODELS["dense"], dataclasses.replace(GRADIENT, clip_norm=0.01), microbatches=2)
    after, metrics = step(state, cut(ragged_batch(ROWS), 2))
    np.testing.assert_allclose(norm(change(state.params, after.params)), 0.01, rtol=1e-4)
    assert metrics["gradient_norm"] > 0.1


def test_the_moving_average_follows_the_new_parameters():
    step, state = lamb_setting()
    expected = state.ema
    for seed in range(3):
        state, _ = step(state, cut(ragged_batch(ROWS, seed=seed), 2))
        expected = jax.tree.map(lambda a, p: 0.75 * np.asarray(a, np.float64) + 0.25 * p, expected, state.params)
        assert distance(state.ema, expected) < 1e-6


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def poison_parameters(state, batch, value):
    params = jax.tree.map(lambda x: x, state.params)
    params["layers"]["mlp"]["up"]["kernel"] = params["layers"]["mlp"]["up"]["kernel"].at[1, 0, 0].set(value)
    return state.replace(params=params), batch


def poison_batch(state, batch, value):
    # As a loss weight, the only floating number in a batch; the last microbatch has it.
    return state, batch | {"loss_mask": batch["loss_mask"].at[-1, 0, 0].set(value)}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("poison", [poison_parameters, poison_batch])
def test_a_step_that_is_not_finite_leaves_no_trace(poison, value):
    step, state = lamb_setting()
    state, _ = step(state, cut(ragged_batch(ROWS, seed=1), 2))  # the optimizer has something to lose
    state, batch = poison(state, cut(ragged_batch(ROWS), 2), value)
    after, metrics = step(state, batch)
    for name in ("params", "opt_state", "ema"):
        assert bits(getattr(after, name)) == bits(getattr(state, name)), name
    assert (int(after.step), int(after.skipped), int(metrics["skipped"])) == (2, 1, 1)


def test_a_gradient_that_is_not_finite_counts_even_where_the_loss_is(monkeypatch):
    loss = ml.train.objective.chunked_loss

    def with_infinite_slope(logits_of, head, hidden, *rest):
        objective, nll = loss(logits_of, head, hidden, *rest)
        return objective + jnp.sqrt(jnp.abs(hidden).sum() * 0), nll  # the root's slope at 0

    monkeypatch.setattr(ml.train.objective, "chunked_loss", with_infinite_slope)
    step, state = setting(MODELS["dense"])
    after, metrics = step(state, cut(ragged_batch(ROWS), 1))
    assert np.isfinite(metrics["objective"]) and not np.isfinite(metrics["gradient_norm"])
    assert bits(after.params) == bits(state.params) and int(after.skipped) == 1


def test_the_reported_rate_is_the_one_in_use_also_after_a_skipped_step():
    linear = ScheduleConfig(kind="linear", warmup_steps=0, end_factor=0.0)
    step, state = setting(MODELS["dense"], schedule=linear)
    in_use, good = [], cut(ragged_batch(ROWS), 1)
    for batch in (good, poison_batch(state, good, np.nan)[1], good, good):
        after, metrics = step(state, batch)
        moved = norm(change(state.params, after.params))
        if int(after.skipped) == int(state.skipped):
            in_use.append(moved / float(metrics["gradient_norm"]) / float(metrics["learning_rate"]))
        state = after
    np.testing.assert_allclose(in_use, [1.0, 1.0, 1.0], rtol=1e-4)


def test_a_batch_in_which_nothing_counts_is_harmless():
    step, state = setting(MODELS["dense"])
    batch = cut(ragged_batch(ROWS), 1)
    after, metrics = step(state, batch | {"loss_mask": jnp.zeros_like(batch["loss_mask"])})
    assert metrics["tokens"] == metrics["loss"] == 0
    assert bits(after.params) == bits(state.params) and int(after.skipped) == 0


def test_a_train_step_fits_on_one_screen():
    assert len(inspect.getsource(ml.train.step.make_train_step).splitlines()) <= 50
