"""Training two towers: the step's gradient on a mesh and off it, the temperature's bound, and a run on digits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_cases import initial_params

from ml.data import ImageTextDataConfig, TokenizerConfig
from ml.errors import UserError
from ml.models import TwoTower, TwoTowerConfig, ViTConfig, logical_axes, num_parameters, text_tower
from ml.models.two_tower_cost import forward_flops
from ml.optim import OptimizerConfig, ScheduleConfig
from ml.parallel import MeshConfig, Rules, batch_axes
from ml.plan.flops import computed_flops
from ml.train.config import EvalConfig, ExperimentConfig, TrainConfig
from ml.train.gradients import make_gradients
from ml.train.image_text_objective import capped
from ml.train.loop import train

MODEL = TwoTowerConfig(
    ViTConfig(image_size=8, patch_size=4, num_layers=2, embed_dim=16, num_heads=2, mlp_dim=32, channels=1,
              pixel_mean=(0.3,), pixel_std=(0.4,)),
    text_tower(vocab_size=320, num_layers=1, embed_dim=16, num_heads=2, max_length=8),
    features=8,
)  # fmt: skip
PARTS, ROWS = 2, 8
DATA = ImageTextDataConfig(
    image_size=8, channels=1, text_length=8, heldout_fraction=0.2, tokenizer=TokenizerConfig(vocab_size=320)
)


def batch():
    rng = np.random.default_rng(0)
    segments = (np.arange(8) < rng.integers(2, 9, (PARTS, ROWS, 1))).astype(np.int32)
    mask = np.ones((PARTS, ROWS, 1), np.float32)
    mask[1, 3] = 0
    images = rng.integers(0, 256, (PARTS, ROWS, 8, 8, 1)).astype(np.uint8)
    return {
        "images": images, "tokens": rng.integers(1, 320, segments.shape).astype(np.int32), "segment_ids": segments,
        "loss_mask": mask, "broken": 0 * mask,
    }  # fmt: skip


def gradients_of(params, whole, config, rules=None):
    place = {} if rules is None else {"place": rules.spec}
    return jax.jit(make_gradients(TwoTower(MODEL, **place), config, rules))(params, whole)[:2]


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=2, fsdp=2, tensor=2),
        pytest.param(MeshConfig(data=4, fsdp=2, layout="zero2"), marks=pytest.mark.slow),
        pytest.param(MeshConfig(data=8, layout="ddp"), marks=pytest.mark.slow),
        pytest.param(MeshConfig(data=1, fsdp=8, layout="zero3"), marks=pytest.mark.slow),
    ],
    ids=lambda mesh: mesh.layout,
)
def test_the_gradient_is_the_same_in_parts_and_on_a_mesh(mesh, quick_compilation):
    """On a mesh every device has a part of each of two microbatches; here all pairs are embedded at once."""
    params, whole = jax.tree.map(jnp.asarray, initial_params(MODEL)), batch()
    once = jax.tree.map(lambda x: jnp.asarray(x.reshape(1, PARTS * ROWS, *x.shape[2:])), whole)
    wanted, metrics = gradients_of(params, once, TrainConfig(batch_size=16))
    rules = Rules.make(mesh)
    config = TrainConfig(batch_size=16, microbatches=PARTS, loss_chunk=1, remat="dots_no_batch")
    with jax.set_mesh(rules.mesh):
        placed = jax.device_put(params, rules.shardings(logical_axes(MODEL), params))
        on_mesh = {k: jax.device_put(v, rules.sharding(*batch_axes(v.ndim - 1))) for k, v in whole.items()}
        found, metrics_on_mesh = gradients_of(placed, on_mesh, config, rules)
    for name in ("objective", "loss", "image_accuracy", "text_accuracy"):
        assert metrics_on_mesh[name] == pytest.approx(float(metrics[name]), rel=1e-5)
    # ZeRO-2 multiplies by copies; all else is float32 throughout.
    norm = np.sqrt(sum(float(np.sum(np.square(x))) for x in jax.tree.leaves(wanted)))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * norm)
    assert abs(float(wanted["logit"]["scale"])) > 1e-3 * norm


def test_the_temperature_is_bounded_and_can_come_back():
    slope = jax.grad(lambda x, sign: sign * capped(x))
    assert float(capped(jnp.float32(9.0))) == pytest.approx(np.log(100))
    assert [float(slope(jnp.float32(x), sign)) for x in (1.0, 9.0) for sign in (1.0, -1.0)] == [1, -1, 1, 0]


def test_parameters_and_flops_are_those_of_the_program():
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), initial_params(MODEL))
    assert num_parameters(MODEL) == sum(x.size for x in jax.tree.leaves(shapes))
    rows = 4

    def run(params, images, tokens):
        x, y = TwoTower(MODEL, attention="reference").apply({"params": params}, images, tokens)
        return x @ y.T

    images, tokens = jnp.zeros((rows, 8, 8, 1)), jnp.zeros((rows, 8), jnp.int32)
    found = computed_flops(jax.make_jaxpr(run)(shapes, images, tokens))
    # The formula leaves out what causality hides; the reference computes it.
    text = MODEL.text
    hidden = 8 * 2 * 2 * text.num_heads * text.head_dim * text.num_layers * (8 - 4.5)
    assert found == pytest.approx(rows * (forward_flops(MODEL, 8, rows) + hidden), rel=1e-6)


def experiment(**changes):
    config = ExperimentConfig(
        MODEL,
        DATA,
        OptimizerConfig("adamw", 0.003, clip_norm=1.0),
        ScheduleConfig(kind="cosine", warmup_fraction=0.1),
        TrainConfig(steps=150, batch_size=64, microbatches=2, remat="none"),
        EvalConfig(batch_size=32),
    )
    return dataclasses.replace(config, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": dataclasses.replace(DATA, image_size=16)}, "data.image_size=16, but config.model.image.image_size=8"),
        ({"data": dataclasses.replace(DATA, text_length=9)}, r"text_length=9 is longer than .*max_length=8"),
        ({"train": TrainConfig(dropout=0.1)}, r"config.train.dropout=0.1 is not for models of images and texts"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        experiment(**changes)


@pytest.mark.slow
def test_a_run_learns_to_tell_digits_it_has_not_seen(tmp_path):
    result = train(experiment(), tmp_path)
    assert result.unit == "pairs" and result.step == 150 and result.heldout is not None
    # A batch of 32 has about three of each digit, which share captions: one in three is the most to be had.
    assert result.heldout.more["image_accuracy"] > 0.15 > 3 / 32
