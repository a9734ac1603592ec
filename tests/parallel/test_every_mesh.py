"""The same loss, gradient and update however eight devices are arranged; state is cut as its parameters are."""

import functools
import itertools
import math

import jax
import numpy as np
import pytest
from jax.tree_util import keystr
from training_cases import MODELS, initial_params, ragged_batch

from ml.models import Transformer, logical_axes
from ml.optim import OPTIMIZERS, OptimizerConfig, ScheduleConfig, make_optimizer
from ml.parallel import MeshConfig, Rules, place_batch
from ml.train.config import TrainConfig
from ml.train.state import abstract_state, init_state
from ml.train.step import make_train_step

pytestmark = pytest.mark.usefixtures("quick_compilation")
ONE = MeshConfig(1, 1, 1)
MESHES = {
    "8x1x1": MeshConfig(8, 1, 1),
    "2x4x1": MeshConfig(2, 4, 1),
    "2x2x2": MeshConfig(2, 2, 2),
    "ddp": MeshConfig(4, 1, 2, layout="ddp"),
    "zero1": MeshConfig(8, 1, 1, layout="zero1"),
    "zero2": MeshConfig(2, 2, 2, layout="zero2"),
    "zero3": MeshConfig(2, 4, 1, layout="zero3"),
    "slices": MeshConfig(4, 2, 1, slices=2),
    "residual": MeshConfig(4, 1, 2, sequence_residual=True),
    "ring": MeshConfig(1, 1, 1, sequence=8),
    "ulysses": MeshConfig(2, 2, 1, sequence=2, layout="zero1"),
    "long": MeshConfig(1, 2, 2, sequence=2, sequence_residual=True, layout="zero2"),
    "experts": MeshConfig(1, 2, 1, expert=4),
    "experts_long": MeshConfig(1, 1, 2, expert=2, sequence=2, layout="zero1"),
    "stages": MeshConfig(2, 2, 1, stage=2),
    "stages_zero2": MeshConfig(1, 2, 2, stage=2, layout="zero2"),
    "stages_long": MeshConfig(1, 1, 1, stage=2, sequence=2, expert=2, layout="zero1"),
}
ROWS, MICROBATCHES = 16, 2
# Rate 1 without momentum: the first update is the gradient itself.
GRADIENT = OptimizerConfig("sgd", 1.0, options={"momentum": 0.0})


def optimizer(name):
    if name == "gradient":
        return GRADIENT
    free = {"dadapt_adamw", "prodigy", "dog", "dowg", "mechanic_adamw", "cocob"}
    # As in a real run: decay, and a clip that bites. An epsilon above the rounding of a gradient that is all but zero,
    # which Adam's division would blow up.
    options = {"eps": 1e-4} if name == "lamb" else {}
    return OptimizerConfig(name, 1.0 if name in free else 0.02, weight_decay=0.1, clip_norm=0.5, options=options)


def two_steps(model_name, optimizer_name, mesh, context="ring"):
    """Starts from the same parameters on any mesh; returns both steps' updates and metrics, and the average."""
    model, config = MODELS[model_name], optimizer(optimizer_name)
    rules = Rules.make(mesh, jax.devices()[: math.prod(mesh.degrees.values())])
    train = TrainConfig(
        steps=4, batch_size=ROWS, microbatches=MICROBATCHES, z_loss=0.01, ema=0.9, loss_chunk=10, context=context
    )
    axes, start = logical_axes(model), initial_params(model)
    tx, rate = make_optimizer(config, ScheduleConfig(kind="constant"), total_steps=4, batch_size=ROWS, axes=axes)
    transformer = Transformer(model, place=rules.spec)
    with jax.set_mesh(rules.mesh):
        params = jax.device_put(start, rules.shardings(axes, start))
        state = init_state(transformer, tx, rules, seed=0, ema=True, params=params)
        copies = check_shardings(state, rules, axes)
        step = jax.jit(make_train_step(transformer, tx, rate, train, rules))
        seen, metrics = [jax.device_get(state.params)], []
        for seed in range(2):
            state, scalars = step(state, place_batch(ragged_batch(ROWS, seed=seed), rules, MICROBATCHES))
            assert check_shardings(state, rules, axes) == copies
            seen.append(jax.device_get(state.params))
            metrics.append(jax.device_get(scalars))
    updates = [jax.tree.map(np.subtract, after, before) for before, after in itertools.pairwise(seen)]
    return updates, metrics, jax.device_get(state.ema), copies


def check_shardings(state, rules, axes):
    """Whatever in the state has a parameter's name and shape must lie as that parameter does, and not on every device.

    Returns how many such arrays the optimizer keeps.
    """
    wanted = rules.shardings(axes, state.params)
    params = jax.tree.leaves_with_path(state.params)
    known = [(keystr(path), x.shape, place) for (path, x), place in zip(params, jax.tree.leaves(wanted), strict=True)]
    found = dict.fromkeys(("params", "ema", "opt_state"), 0)
    for part in found:
        for path, x in jax.tree.leaves_with_path(getattr(state, part)):
            for name, shape, place in known:
                if keystr(path).endswith(name) and x.shape == shape:
                    assert x.sharding.is_equivalent_to(place, x.ndim), f"{part}{keystr(path)}: {x.sharding}"
                    found[part] += 1
    assert found["params"] == found["ema"] == len(known)
    return found["opt_state"] / len(known)


@functools.cache
def on_one_device(model_name, optimizer_name):
    return two_steps(model_name, optimizer_name, ONE)


def distance(got, expected):
    """Length of the difference as a share of the update's, leaf by leaf; tiny leaves are measured by the largest."""
    largest = max(np.linalg.norm(x) / x.size**0.5 for x in jax.tree.leaves(expected))

    def of(a, b):
        return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-2 * largest * b.size**0.5)

    return max(jax.tree.leaves(jax.tree.map(of, got, expected)))


def check(model_name, optimizer_name, mesh, tolerance):
    updates, metrics, average, copies = two_steps(
        model_name, optimizer_name, MESHES[mesh], mesh if mesh == "ulysses" else "ring"
    )
    expected, expected_metrics, expected_average, same_copies = on_one_device(model_name, optimizer_name)
    assert copies == same_copies
    # The second step starts from where rounding left the first.
    for step, allowed in enumerate((tolerance, 10 * tolerance)):
        names = ("loss", "objective", "balance", "gradient_norm", "parameter_norm", "tokens", "skipped")
        for name in (*names, *(name for name in expected_metrics[step] if name.startswith("trust_ratio/"))):
            np.testing.assert_allclose(metrics[step][name], expected_metrics[step][name], rtol=allowed, err_msg=name)
        assert distance(updates[step], expected[step]) < allowed
    assert distance(average, expected_average) < 10 * tolerance
    return copies


# What they do, `2x2x2`, `slices` and `stages_zero2` do too, and `stages_long` with another model.
_AS_OTHERS = {"8x1x1", "2x4x1", "zero3", "stages", "stages_long"}


# Between them: all kinds of meshes, experts, windows that alternate, tied embeddings, learned positions, and biases.
@pytest.mark.sweep("moe-2x2x2", "moe-experts_long", "gpt2-stages")
@pytest.mark.parametrize(
    ("model", "mesh"),
    [("moe", mesh) for mesh in MESHES if mesh not in _AS_OTHERS]
    + [("gemma", mesh) for mesh in ("zero1", "ring", "stages_long")]
    + [("gpt2", mesh) for mesh in ("2x2x2", "zero2", "long", "stages")],
)
def test_the_same_loss_and_gradient_on_every_mesh(model, mesh):
    check(model, "gradient", mesh, 1e-5)


# How many arrays of each parameter's shape the state holds at least; Adafactor factors them away.
_COPIES = {"lamb": 2, "lars": 1, "adamw": 2, "sgd": 1, "muon": 1}


@pytest.mark.sweep("lamb-2x2x2", "muon-zero1")
@pytest.mark.parametrize(
    ("name", "mesh"),
    [(name, "2x2x2") for name in ("lamb", "lars", "adamw", "adafactor", "muon")]
    + [("lamb", "zero1"), ("muon", "zero1"), pytest.param("lamb", "stages_zero2", marks=pytest.mark.slow)],
)
def test_the_same_update_on_every_mesh(name, mesh):
    assert check("dense", name, mesh, 1e-5) >= _COPIES.get(name, 0)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("model", MODELS)
def test_every_model_has_the_same_gradient_on_every_mesh(model, mesh):
    check(model, "gradient", mesh, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["8x1x1", "2x4x1", "2x2x2", "zero1", "zero2", "zero3", "long", "stages"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_makes_the_same_update_on_every_mesh(name, mesh):
    assert check("tied", name, mesh, 1e-3) >= _COPIES.get(name, 0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_keeps_its_state_cut_as_the_parameters_are(name):
    """Before anything is made: of each array that has a parameter's name and shape, and of whatever is as large."""
    rules, axes = Rules.make(MeshConfig(2, 2, 2, layout="zero1")), logical_axes(MODELS["tied"])
    tx, _ = make_optimizer(optimizer(name), ScheduleConfig(), total_steps=4, batch_size=ROWS, axes=axes)
    state = abstract_state(Transformer(MODELS["tied"], place=rules.spec), tx, rules, ema=True)
    assert check_shardings(state, rules, axes) >= _COPIES.get(name, 0)
    whole = [x for x in jax.tree.leaves(state.opt_state) if x.size > 1 and x.sharding.is_fully_replicated]
    assert sum(x.size for x in whole) < 0.1 * sum(x.size for x in jax.tree.leaves(state.params))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["ring", "stages"])
def test_a_collective_that_is_left_out_is_noticed(mesh, monkeypatch):
    monkeypatch.setattr(jax.lax, "ppermute", lambda x, axis, permutation: x)
    with pytest.raises(AssertionError):
        check("dense", "gradient", mesh, 1e-5)
