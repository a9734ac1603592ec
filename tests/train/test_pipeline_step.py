"""A pipeline sums the same loss and gradient as microbatches that go through the whole model one after another."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_cases import LENGTH, MODELS, initial_params, ragged_batch

import ml.train.pipeline
from ml.errors import UserError
from ml.models import Transformer, init_params, logical_axes
from ml.parallel import MeshConfig, Rules, place_batch
from ml.train.config import TrainConfig
from ml.train.objective import make_loss
from ml.train.pipeline import pipelined_loss, pipelined_value_and_grad
from ml.train.pipeline_parts import Parts
from ml.weights import Gathered

pytestmark = pytest.mark.usefixtures("quick_compilation")
ROWS = 4  # of a microbatch
# Plain stages round off as one device does. Sums cut over other axes do not: tensor parallelism alone, without any
# pipeline, differs by 2e-5 for the softcapped model.
RELATIVE = 1e-5


def model_config(name, layers, **changes):
    return dataclasses.replace(MODELS[name], num_layers=layers, **changes)


def batch_of(microbatches, vocab):
    return ragged_batch(ROWS * microbatches, vocab=vocab)


@functools.cache
def sequential(config, microbatches):
    """Summed gradients and metrics of the microbatches, on one device."""
    train = TrainConfig(z_loss=0.01, loss_chunk=10)
    grad_of = jax.jit(jax.value_and_grad(make_loss(Transformer(config), train), has_aux=True))
    params, batch = initial_params(config), batch_of(microbatches, config.vocab_size)
    total = None
    for i in range(microbatches):
        (objective, metrics), grads = grad_of(params, {k: x[ROWS * i : ROWS * (i + 1)] for k, x in batch.items()})
        new = jax.device_get((grads, metrics | {"objective": objective}))
        total = new if total is None else jax.tree.map(np.add, total, new)
    return total


def train_config(microbatches, chunks=1, kind="1f1b", **changes):
    sizes = {"batch_size": ROWS * microbatches, "microbatches": microbatches}
    return TrainConfig(**sizes, z_loss=0.01, loss_chunk=10, pipeline=kind, pipeline_chunks=chunks, **changes)


def on_mesh(config, mesh, microbatches, remat="none"):
    """Rules, model, placed parameters and placed batch; to be used within ``jax.set_mesh(rules.mesh)``."""
    rules = Rules.make(mesh, jax.devices()[: math.prod(mesh.degrees.values())])
    start = initial_params(config)
    params = jax.device_put(start, rules.shardings(logical_axes(config), start))
    batch = place_batch(batch_of(microbatches, config.vocab_size), rules, microbatches)
    return rules, Transformer(config, remat=remat, place=rules.spec), params, batch


def norm(tree):
    return math.sqrt(sum(np.sum(np.square(np.asarray(x, np.float64))) for x in jax.tree.leaves(tree)))


def check(got, expected, tolerance=RELATIVE):
    grads, metrics = jax.device_get(got)
    difference = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, grads, expected[0])
    assert norm(difference) < tolerance * norm(expected[0])
    # Also of each parameter by itself, or the large ones would hide the small; but not where rounding is all there is.
    for path, leaf in jax.tree.leaves_with_path(expected[0]):
        part = functools.reduce(lambda tree, key: tree[key.key], path, difference)
        assert norm(part) < 10 * tolerance * max(norm(leaf), 1e-3 * norm(expected[0])), path
    assert set(metrics) == set(expected[1])
    for name, value in expected[1].items():
        np.testing.assert_allclose(metrics[name], value, rtol=RELATIVE, err_msg=name)


STAGE2, STAGE4 = MeshConfig(data=1, stage=2), MeshConfig(data=1, stage=4)
ALL = MeshConfig(data=1, fsdp=2, tensor=2, stage=2)
CASES = {
    "dense, as many microbatches as stages": ("dense", 2, STAGE2, 2, 1, "1f1b"),
    "moe, fsdp and tensor, two chunks": ("moe", 4, ALL, 4, 2, "1f1b"),
    "gemma, windows that alternate within a stage and between stages": ("gemma", 6, STAGE2, 2, 1, "1f1b"),
    "gpt2, fewer microbatches than stages": ("gpt2", 4, STAGE4, 3, 1, "1f1b"),
    "tied, four stages, two chunks, data": ("tied", 8, MeshConfig(data=2, stage=4), 8, 2, "gpipe"),
}


def gradients(case, **changes):
    name, layers, mesh, microbatches, chunks, kind = case
    config = model_config(name, layers, **changes)
    rules, model, params, batch = on_mesh(config, mesh, microbatches)
    with jax.set_mesh(rules.mesh):
        step = jax.jit(pipelined_value_and_grad(model, train_config(microbatches, chunks, kind), rules))
        got = step(params, batch)
        for grad, param in zip(jax.tree.leaves(got[0]), jax.tree.leaves(params), strict=True):
            assert grad.sharding == param.sharding
    return got, sequential(config, microbatches)


@pytest.mark.sweep("moe, fsdp and tensor, two chunks")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_gradient_is_that_of_the_whole_model(case):
    # With biases an idle stage's zeros do not stay zero.
    check(*gradients(case, out_bias=True))


def test_a_vocabulary_that_does_not_divide_into_the_stages():
    case = ("tied", 4, STAGE4, 5, 1, "gpipe")
    check(*gradients(case, vocab_size=66))


def test_what_is_not_due_is_skipped_where_branches_may_communicate(monkeypatch):
    # As on accelerators; on a mesh of stages alone no two collectives are independent, so that it is safe here, too.
    monkeypatch.setattr(ml.train.pipeline, "_may_branch", lambda mesh: True)
    check(*gradients(("tied", 4, STAGE2, 4, 2, "1f1b")))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["1f1b", "gpipe"])
@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_every_model_in_every_pipeline(name, stages, chunks, kind):
    for microbatches in (2 * stages,) if chunks > 1 else (1, stages + 3):
        mesh = MeshConfig(data=1, fsdp=2, stage=stages)
        check(*gradients((name, stages * chunks, mesh, microbatches, chunks, kind)))


def test_the_loss_alone_for_any_number_of_microbatches():
    config = model_config("moe", 4)
    for microbatches in (1, 3):
        rules, model, params, batch = on_mesh(config, STAGE2, microbatches)
        with jax.set_mesh(rules.mesh):
            loss = jax.jit(pipelined_loss(model, train_config(2, chunks=2), rules))
            objective, metrics = loss(params, batch)
        assert float(objective) == float(metrics["objective"])
        expected = sequential(config, microbatches)[1]
        for name in ("objective", "loss", "balance"):
            np.testing.assert_allclose(metrics[name], expected[name], rtol=RELATIVE, err_msg=name)


@pytest.mark.slow
def test_shards_receive_the_gradient_of_whole_copies():
    config, mesh = model_config("tied", 4), MeshConfig(data=2, stage=2, layout="zero2")
    rules, model, params, batch = on_mesh(config, mesh, 2)
    axes = logical_axes(config)

    def pair(shards, copies):
        return jax.tree.map(lambda s, c: s if jax.typeof(s) == jax.typeof(c) else Gathered(s, c), shards, copies)

    with jax.set_mesh(rules.mesh):
        run = pipelined_value_and_grad(model, train_config(2, chunks=2), rules, wrap=pair)

        def step(params, batch):
            copies = jax.tree.map(
                lambda names, x: jax.reshard(x, rules.spec(*names, kind="compute")),
                axes,
                params,
                is_leaf=lambda x: isinstance(x, tuple),
            )
            return run(params, batch, copies)

        got = jax.jit(step)(params, batch)
    kernel = got[0]["layers"]["mlp"]["up"]["kernel"]
    assert kernel.sharding == params["layers"]["mlp"]["up"]["kernel"].sharding and "data" in kernel.sharding.spec
    check(got, sequential(config, 2))


def test_the_vocabulary_is_cut_over_the_stages():
    config = model_config("dense", 2)
    rules, model, params, _ = on_mesh(config, ALL, 1)
    parts = Parts(model, train_config(2), rules, lambda microbatch: None, lambda params, constants: params)
    rest = {name: value for name, value in params.items() if name != "layers"}
    x = jax.ShapeDtypeStruct(
        (ROWS, LENGTH, config.embed_dim), jnp.float32, sharding=rules.sharding("batch", "length", None)
    )
    with jax.set_mesh(rules.mesh):
        spread = jax.jit(parts.spread)(rest)
        logits = jax.eval_shape(lambda rest, x: parts._ends.apply({"params": rest}, x, method="logits"), spread, x)
    assert spread["embed"]["embedding"].sharding.spec[0] == ("tensor", "stage")
    assert spread["unembed"]["kernel"].sharding.spec[1] == logits.sharding.spec[2] == ("tensor", "stage")


@functools.cache
def planned(kind, microbatches):
    """Temporary bytes of a step, and the length of its program, compiled for a model whose activations dominate."""
    length, config = 64, model_config("dense", 4, max_length=64, vocab_size=8)
    rules = Rules.make(STAGE2, jax.devices()[:2])
    model = Transformer(config, remat="full", place=rules.spec)
    axes, shapes = logical_axes(config), jax.eval_shape(lambda: init_params(model, jax.random.key(0)))

    def struct(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    params = jax.tree.map(struct, shapes, rules.shardings(axes, shapes))
    batch = {
        name: jax.ShapeDtypeStruct((microbatches, 8, length), x.dtype, sharding=rules.sharding(None, "batch", "length"))
        for name, x in ragged_batch(1).items()
    }
    with jax.set_mesh(rules.mesh):
        step = jax.jit(pipelined_value_and_grad(model, train_config(microbatches, 2, kind), rules))
        lowered = step.lower(params, batch)
        compiled = lowered.compile()
    hidden = 8 * length * config.embed_dim * 4
    return compiled.memory_analysis().temp_size_in_bytes / hidden, len(lowered.as_text())


@pytest.mark.slow
def test_memory_is_flat_in_the_number_of_microbatches_with_1f1b_alone():
    (few, size), (many, same_size) = planned("1f1b", 4), planned("1f1b", 16)
    assert many - few < 0.5, "in units of one hidden state of a microbatch"
    assert abs(size - same_size) < 0.02 * size, "the program's size is flat, too"
    # Two inputs of each further microbatch, one for each chunk, and its head's gradient.
    assert planned("gpipe", 16)[0] - planned("gpipe", 4)[0] == pytest.approx(3 * 12, rel=0.05)


def test_what_does_not_divide_is_refused():
    rules = Rules.make(STAGE2, jax.devices()[:2])
    model = Transformer(model_config("dense", 3), place=rules.spec)
    for make in (pipelined_value_and_grad, pipelined_loss):
        with pytest.raises(UserError, match=r"num_layers=3 is not a multiple of config\.mesh\.stage=2"):
            make(model, train_config(2), rules)
    rules, model, params, batch = on_mesh(model_config("dense", 4), STAGE2, 3)
    with pytest.raises(UserError, match=r"microbatches=3 is not a multiple of config\.mesh\.stage=2"):
        pipelined_value_and_grad(model, train_config(3, chunks=2), rules)
    step = pipelined_value_and_grad(model, train_config(4, chunks=2), rules)
    with jax.set_mesh(rules.mesh), pytest.raises(UserError, match="microbatches=3"):
        jax.eval_shape(step, params, batch)
