"""Experts in the train step: counts carried from microbatch to microbatch, the router's bias, and the mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_cases import LENGTH, MODELS, initial_params, ragged_batch

from ml.models import SelfAttention, Transformer, logical_axes
from ml.models.moe import update_router_bias
from ml.optim import OptimizerConfig, ScheduleConfig, make_optimizer
from ml.parallel import MeshConfig, Rules, place_batch
from ml.train.config import TrainConfig
from ml.train.state import TrainState
from ml.train.step import make_train_step

pytestmark = pytest.mark.usefixtures("quick_compilation")
ROWS, MICROBATCHES = 16, 2
STILL = OptimizerConfig("sgd", 1e-30, options={"momentum": 0.0})
GRADIENT = OptimizerConfig("sgd", 1.0, options={"momentum": 0.0})


def model_with(**options):
    return dataclasses.replace(MODELS["moe"], moe=dataclasses.replace(MODELS["moe"].moe, **options))


def start(model, optimizer, params, rules=None):
    """The jitted step and a state of ``params``."""
    config = TrainConfig(steps=10, batch_size=ROWS, microbatches=MICROBATCHES)
    axes = logical_axes(model)
    tx, rate = make_optimizer(optimizer, ScheduleConfig(kind="constant"), total_steps=10, batch_size=ROWS, axes=axes)
    transformer = Transformer(model, place=rules.spec) if rules else Transformer(model)
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(zero, params, jax.jit(tx.init)(params), None, zero)
    return jax.jit(make_train_step(transformer, tx, rate, config, rules)), state


def cut(batch, microbatches=MICROBATCHES):
    return {name: x.reshape(microbatches, -1, LENGTH) for name, x in batch.items()}


def counts_and_balances(model, params, batch):
    """Microbatch by microbatch, with the counts of those before it."""
    apply = jax.jit(Transformer(model).apply)
    earlier = jnp.zeros((model.num_layers, model.moe.num_experts), jnp.int32)
    balances = []
    for i in range(len(batch["tokens"])):
        part = {name: x[i] for name, x in batch.items()}
        strategy, valid = SelfAttention(part["segment_ids"]), part["segment_ids"] > 0
        variables = {"params": params}
        stats = apply(variables, part["tokens"], strategy, part["positions"], valid=valid, expert_counts=earlier)[2]
        balances.append(stats.balance)
        earlier = earlier + stats.counts
    return earlier, np.array(balances)


def test_counts_grow_over_the_microbatches_of_a_step_and_begin_anew_in_the_next():
    model, batch = model_with(balance_over="batch"), cut(ragged_batch(ROWS), 8)
    params = initial_params(model)
    step, state = start(model, STILL, params)
    tokens = batch["loss_mask"].sum(axis=(1, 2))
    _, balances = counts_and_balances(model, params, batch)
    expected = (balances * tokens).sum() / tokens.sum()
    for _ in range(2):
        state, metrics = step(state, batch)
        np.testing.assert_allclose(metrics["balance"], expected, rtol=1e-5)
    _, alone = start(model_with(balance_over="microbatch"), STILL, params)[0](state, batch)
    assert abs(alone["balance"] - expected) > 1e-3, "the counts of earlier microbatches are meant to matter"


def test_the_bias_follows_the_load_of_the_whole_batch_and_a_skipped_step_leaves_it():
    model, batch = model_with(bias_update_rate=0.01), cut(ragged_batch(ROWS))
    params = initial_params(model)
    step, state = start(model, OptimizerConfig("lamb", 0.1, weight_decay=0.1, clip_norm=0.5), params)
    counts, _ = counts_and_balances(model, params, batch)
    assert counts.sum() == 2 * model.moe.top_k * (batch["segment_ids"] > 0).sum()
    after, _ = step(state, batch)
    wanted = update_router_bias(params, counts, 0.01)["layers"]["moe"]["router"]["bias"]
    bias = after.params["layers"]["moe"]["router"]["bias"]
    np.testing.assert_allclose(bias, wanted, atol=1e-7)
    assert np.abs(bias - params["layers"]["moe"]["router"]["bias"]).max() > 0.005
    spoiled = batch | {"loss_mask": np.full_like(batch["loss_mask"], np.nan)}
    skipped, metrics = step(after, spoiled)
    assert metrics["skipped"] == 1
    np.testing.assert_array_equal(skipped.params["layers"]["moe"]["router"]["bias"], bias)


@pytest.mark.sweep("hybrid-options1", "zero3-options5")
@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        (MeshConfig(data=2, expert=4), {"balance_over": "batch"}),
        (MeshConfig(data=1, fsdp=2, expert=2, tensor=2), {"bias_update_rate": 0.01}),
        (MeshConfig(data=2, expert=4, layout="ddp"), {}),
        (MeshConfig(data=2, fsdp=2, expert=2, layout="zero1"), {}),
        (MeshConfig(data=2, expert=2, tensor=2, layout="zero2"), {"bias_update_rate": 0.01}),
        (MeshConfig(data=2, expert=4, layout="zero3"), {}),
        (MeshConfig(data=2, expert=2, tensor=2, sequence_residual=True), {}),
    ],
    ids=lambda value: getattr(value, "layout", None),
)
def test_the_same_update_with_experts_spread_over_the_mesh(mesh, options):
    model, batch = model_with(**options), ragged_batch(ROWS)
    params, axes = initial_params(model), logical_axes(model)
    step, state = start(model, GRADIENT, params)
    wanted, scalars = jax.device_get(step(state, cut(batch)))
    rules = Rules.make(mesh)
    with jax.set_mesh(rules.mesh):
        placed = jax.device_put(params, rules.shardings(axes, params))
        step, state = start(model, GRADIENT, placed, rules)
        got, metrics = jax.device_get(step(state, place_batch(batch, rules, MICROBATCHES)))
    for name in ("loss", "objective", "balance", "gradient_norm", "tokens"):
        np.testing.assert_allclose(metrics[name], scalars[name], rtol=1e-5, err_msg=name)
    moved, expected = (jax.tree.map(np.subtract, after.params, params) for after in (got, wanted))
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * max(np.abs(b).max(), 1e-3 * largest))
