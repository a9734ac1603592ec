"""What a network learns from images: smoothed labels; running statistics; the same on eight devices as on one."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from image_training_cases import MODEL, ROWS, cut, image_batch, setting

from ml.models import init_model_state, module_of
from ml.optim import OptimizerConfig
from ml.parallel import MeshConfig, Rules, place_batch
from ml.train.config import TrainConfig
from ml.train.evaluation import make_evaluate

pytestmark = pytest.mark.usefixtures("quick_compilation")


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def assert_close(got, expected, share=1e-4):
    """Leaf by leaf, as a share of the leaf's largest entry; tiny leaves are measured by the largest of all."""
    largest = max(np.abs(x).max() for x in jax.tree.leaves(expected))

    def of(a, b):
        np.testing.assert_allclose(a, b, atol=share * max(np.abs(b).max(), 1e-2 * largest))

    jax.tree.map(of, jax.device_get(got), jax.device_get(expected))


def test_the_update_is_the_gradient_of_the_smoothed_cross_entropy():
    step, state = setting(label_smoothing=0.2, microbatches=2)
    batch, model = cut(image_batch(), 2), module_of(MODEL)

    def parts(params):
        smooth = plain = right = 0.0
        for part in range(2):
            logits, _ = model.apply({"params": params}, batch["images"][part], True, mutable=["batch_stats"])
            labels = batch["targets"][part][:, 0]
            one_hot = jax.nn.one_hot(labels, MODEL.num_classes)
            smooth += optax.softmax_cross_entropy(logits, optax.smooth_labels(one_hot, 0.2)).sum() / ROWS
            plain += optax.softmax_cross_entropy(logits, one_hot).sum() / ROWS
            right += (logits.argmax(-1) == labels).sum() / ROWS
        return smooth, (plain, right)

    (smooth, (plain, right)), gradient = jax.jit(jax.value_and_grad(parts, has_aux=True))(state.params)
    after, metrics = step(state, batch)
    assert_close(jax.tree.map(lambda a, b: a - b, state.params, after.params), gradient)
    np.testing.assert_allclose(metrics["objective"], smooth, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], plain, rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], right, rtol=1e-6)
    assert metrics["tokens"] == ROWS and metrics["broken"] == 0


@pytest.mark.sweep("True")
@pytest.mark.parametrize("averaged", [True, False])
def test_running_statistics_take_in_a_step_once(averaged):
    """However many microbatches; and their average follows them as that of the parameters follows these."""
    step, state = setting(microbatches=2, ema=0.8, ema_statistics=averaged)
    batch, model = cut(image_batch(), 2), module_of(MODEL)

    @jax.jit
    def statistics(images):
        return model.apply({"params": state.params}, images, True, mutable=["batch_stats"])[1]["batch_stats"]

    parts = [statistics(batch["images"][part]) for part in range(2)]
    start = init_model_state(model)["batch_stats"]
    expected = jax.tree.map(lambda old, a, b: 0.9 * old + 0.1 * (a + b) / 2, start, *parts)
    after, _ = step(state, batch)
    assert_close(after.model_state["batch_stats"], expected, 1e-5)
    assert ("average_batch_stats" in after.model_state) == averaged
    if averaged:
        average = jax.tree.map(lambda old, new: 0.8 * old + 0.2 * new, start, expected)
        assert_close(after.model_state["average_batch_stats"], average, 1e-5)


def test_a_step_that_is_not_finite_leaves_statistics_as_they_were():
    step, state = setting(optimizer=OptimizerConfig("lamb", 0.1), ema=0.8, microbatches=2)
    state, _ = step(state, cut(image_batch(), 2))
    batch = cut(image_batch(seed=1), 2)
    batch["loss_mask"] = batch["loss_mask"].copy()
    batch["loss_mask"][1, 0, 0] = np.nan
    after, _ = step(state, batch)
    for name in ("params", "opt_state", "ema", "model_state"):
        assert bits(getattr(after, name)) == bits(getattr(state, name)), name
    assert (int(after.step), int(after.skipped)) == (2, 1)
    moved, _ = step(state, cut(image_batch(seed=1), 2))
    assert bits(moved.model_state) != bits(state.model_state)


MESHES = {"data": MeshConfig(8), "fsdp": MeshConfig(2, 4), "zero1": MeshConfig(4, 2, layout="zero1")}


_SLOW = [pytest.param(mesh, group, marks=pytest.mark.slow) for mesh, group in (("data", 2), ("fsdp", 0))]


@pytest.mark.parametrize(("mesh", "group"), [("zero1", 0), *_SLOW])
def test_eight_devices_do_what_one_does(mesh, group):
    """Statistics of all rows, whichever devices hold them; or of groups of them."""
    config = dataclasses.replace(MODEL, batch_norm_group=group)
    outcomes = []
    for shape, devices in ((MeshConfig(1), 1), (MESHES[mesh], 8)):
        rules = Rules.make(shape, jax.devices()[:devices])
        with jax.set_mesh(rules.mesh):
            step, state = setting(config, rules=rules, microbatches=1, label_smoothing=0.1)
            for seed in range(2):
                state, metrics = step(state, place_batch(image_batch(seed=seed), rules, 1))
            evaluate = make_evaluate(module_of(config, place=rules.spec), TrainConfig(remat="none"), rules)
            held = evaluate(state.params, [image_batch(seed=5)], model_state=state.model_state)
        outcomes.append(jax.device_get((state.params, state.model_state, metrics, held.scalars)))
    assert_close(outcomes[1], outcomes[0], 1e-4)


def test_evaluation_goes_by_running_statistics_and_leaves_padding_out():
    rules = Rules.make(MeshConfig(1), jax.devices()[:1])
    model = module_of(MODEL, place=rules.spec)
    with jax.set_mesh(rules.mesh):
        step, state = setting(rules=rules)
        state, _ = step(state, place_batch(image_batch(), rules, 1))
        evaluate = make_evaluate(model, TrainConfig(remat="none", label_smoothing=0.3), rules)
        batch = image_batch(seed=7)
        batch["loss_mask"][10:] = 0
        held = evaluate(state.params, [batch], model_state=state.model_state)
        logits = module_of(MODEL).apply(
            {"params": state.params, "batch_stats": state.model_state["batch_stats"]}, batch["images"][:10]
        )
        labels = batch["targets"][:10, 0]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        np.testing.assert_allclose(held.per_token, losses.mean(), rtol=1e-5)
        np.testing.assert_allclose(held.more["accuracy"], (logits.argmax(-1) == labels).mean(), rtol=1e-6)
        assert held.tokens == 10
