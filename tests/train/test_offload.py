"""State and activations in the hosts' memory: the same numbers, less on the device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_cases import LENGTH, MODELS, experiment, initial_params, ragged_batch, write_corpus

from ml.data import DataConfig
from ml.models import Transformer, TransformerConfig, logical_axes
from ml.optim import OptimizerConfig, ScheduleConfig, make_optimizer
from ml.parallel import MeshConfig, Rules, place_batch
from ml.plan import topology
from ml.plan.program import assemble
from ml.train.config import ExperimentConfig, TrainConfig
from ml.train.loop import train
from ml.train.state import abstract_state, init_state
from ml.train.step import make_train_step

pytestmark = pytest.mark.usefixtures("quick_compilation")
LAMB = OptimizerConfig("lamb", 0.1)


def step_on_mesh(**settings):
    """Two steps; returns the state after each."""
    model, config = MODELS["dense"], TrainConfig(batch_size=8, **settings)
    rules = Rules.make(MeshConfig(2, 2, 2))
    axes = logical_axes(model)
    tx, rate = make_optimizer(LAMB, ScheduleConfig(), total_steps=4, batch_size=8, axes=axes)
    transformer = Transformer(model, remat=config.remat, place=rules.spec)
    with jax.set_mesh(rules.mesh):
        start = initial_params(model)
        params = jax.device_put(start, rules.shardings(axes, start))
        offload = config.offload_optimizer
        state = init_state(transformer, tx, rules, seed=0, ema=True, offload=offload, params=params)
        wanted = abstract_state(transformer, tx, rules, ema=True, offload=offload)
        step = jax.jit(make_train_step(transformer, tx, rate, config, rules), donate_argnums=0)
        for seed in range(2):
            kinds = jax.tree.map(lambda x, w: x.sharding.is_equivalent_to(w.sharding, x.ndim), state, wanted)
            assert all(jax.tree.leaves(kinds)), "where the state lies is known before it is made"
            state, _ = step(state, place_batch(ragged_batch(8, seed=seed), rules, 1))
    return state


def memory_kinds(tree):
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree) if x.ndim}


def test_the_optimizer_state_rests_on_the_host_and_nothing_else_changes():
    here, there = step_on_mesh(), step_on_mesh(offload_optimizer=True)
    assert memory_kinds(there.opt_state) == {"pinned_host"}
    assert memory_kinds((there.params, there.ema, here.opt_state)) == {"device"}
    for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_a_checkpoint_comes_back_to_where_the_state_rests(tmp_path):
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    change = {"train__microbatches": 1, "train__steps": 4, "schedule__kind": "constant"}
    train(experiment(corpus, **change | {"train__steps": 2}), tmp_path / "run")
    result = train(
        experiment(corpus, **change | {"train__steps": 4, "train__offload_optimizer": True}), tmp_path / "run"
    )
    straight = train(experiment(corpus, **change | {"train__steps": 4}), tmp_path / "straight")
    assert result.step == straight.step == 4
    assert result.heldout.per_token == pytest.approx(straight.heldout.per_token, rel=1e-6)


@pytest.mark.slow
def test_activations_in_host_memory_change_no_gradient():
    batch = {name: jnp.asarray(x) for name, x in ragged_batch(4, LENGTH).items()}

    def gradient(remat):
        model = Transformer(MODELS["gemma"], remat=remat)

        def loss(params):
            hidden = model.apply({"params": params}, batch["tokens"], None, batch["positions"])[0]
            return jnp.square(hidden).sum()

        return jax.jit(jax.grad(loss))(jax.tree.map(jnp.asarray, initial_params(MODELS["gemma"])))

    for a, b in zip(jax.tree.leaves(gradient("full")), jax.tree.leaves(gradient("offload")), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def planned(**settings):
    """Memory of a step on four TPUs, as their compiler plans it: 4 layers of 256, 4 rows of 128 tokens on each."""
    model = TransformerConfig(
        vocab_size=1024, num_layers=4, embed_dim=256, num_heads=2, num_kv_heads=2, head_dim=128, mlp_dim=512,
        max_length=128, tie_embeddings=True,
    )  # fmt: skip
    config = ExperimentConfig(
        model=model,
        data=DataConfig(sequence_length=128),
        optimizer=OptimizerConfig("adamw", 1e-3),
        train=dataclasses.replace(TrainConfig(batch_size=16, dtype="bfloat16", attention="xla"), **settings),
    )
    return assemble(config, topology.parse("v5e:2x2").devices()).compile().memory_analysis()


@pytest.mark.slow  # compilations for a TPU cannot be cached
def test_what_moves_to_the_host_on_a_tpu(absent_tpus):
    plan, offloaded = planned(remat="full"), planned(remat="offload", offload_optimizer=True)
    moments = 2 * (plan.argument_size_in_bytes - 5 * 4 * 128 * 4) / 3  # parameters and two moments, but for the batch
    assert offloaded.host_argument_size_in_bytes == pytest.approx(moments, rel=0.05)
    saved = 4 * 4 * 128 * 256 * 2  # the input of each layer, bfloat16
    assert offloaded.host_temp_size_in_bytes >= saved
    assert plan.argument_size_in_bytes - offloaded.argument_size_in_bytes == pytest.approx(moments, rel=0.05)
