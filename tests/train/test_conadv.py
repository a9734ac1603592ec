"""Adversarial training: what is attacked by which weights, what learns from it, and what waits for what."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from image_training_cases import MODEL, ROWS, cut, image_batch, setting
from jax.interpreters import partial_eval

from ml.models import module_of
from ml.parallel import MeshConfig, Rules, place_batch
from ml.train.conadv import attack
from ml.train.config import TrainConfig
from ml.train.objective import make_objective

pytestmark = pytest.mark.usefixtures("quick_compilation")
STEP = 0.1
PLAIN = module_of(MODEL)


def with_next(batch, following):
    return batch | {f"next_{name}": following[name] for name in ("images", "targets")}


def textbook_loss(params, pixels, targets):
    """Mean cross-entropy of pixels in [0, 1] by their own batch statistics; and these."""
    logits, state = PLAIN.apply({"params": params}, pixels, True, mutable=["batch_stats"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets[:, 0]).mean(), state["batch_stats"]


@jax.jit
def textbook_attack(params, images, targets):
    pixels = images / 255.0
    slope = jax.grad(lambda x: textbook_loss(params, x, targets)[0])(pixels)
    return jnp.clip(pixels + STEP * jnp.sign(slope), 0, 1)


@jax.jit
def textbook_gradient(params, images, attacked, targets):
    """Of the mean of both losses, each over its own microbatch ``[1, rows]``, with both statistics."""

    def loss(params):
        clean, of_clean = textbook_loss(params, images / 255.0, targets)
        also, of_attacked = textbook_loss(params, attacked, targets)
        return (clean + also) / 2, (of_clean, of_attacked)

    return jax.grad(loss, has_aux=True)(params)


def assert_close(got, expected, share=2e-4):
    largest = max(np.abs(x).max() for x in jax.tree.leaves(expected))

    def of(a, b):
        np.testing.assert_allclose(a, b, atol=share * max(np.abs(b).max(), 1e-2 * largest))

    jax.tree.map(of, jax.device_get(got), jax.device_get(expected))


def change(before, after):
    return jax.tree.map(lambda a, b: a - b, before.params, after.params)


def test_an_attack_is_a_step_along_the_sign_within_the_pixels():
    _, state = setting()
    batch = image_batch()
    batch["images"][:, 0], batch["images"][:, 1] = 0, 255  # at both ends of what a pixel can be
    found = np.asarray(attack(PLAIN, state.params, batch["images"], batch["targets"], STEP))
    pixels = batch["images"] / 255
    np.testing.assert_allclose(
        pixels + found, textbook_attack(state.params, batch["images"], batch["targets"]), atol=1e-6
    )
    inside = (pixels > STEP) & (pixels < 1 - STEP)
    np.testing.assert_allclose(np.abs(found[inside]), STEP, atol=1e-6)
    assert (found[:, 0] >= 0).all() and (found[:, 1] <= 0).all() and (found[:, 0] > 0).any()
    before, after = (textbook_loss(state.params, x, batch["targets"])[0] for x in (pixels, pixels + found))
    assert after > before + 0.1


@pytest.mark.slow
def test_sequential_attacks_go_by_the_weights_that_are_trained():
    step, state = setting(adversarial="sequential", adversarial_step=STEP)
    batch = cut(image_batch(), 1)
    images, targets = batch["images"][0], batch["targets"][0]
    after, metrics = step(state, batch)
    attacked = textbook_attack(state.params, images, targets)
    gradient, (clean, other) = textbook_gradient(state.params, images, attacked, targets)
    assert_close(change(state, after), gradient)
    for name, statistics in (("batch_stats", clean), ("adversarial_batch_stats", other)):
        start = state.model_state[name]
        assert_close(after.model_state[name], jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, start, statistics))
    assert metrics["adversarial_loss"] > metrics["loss"] + 0.1
    assert np.isclose(metrics["loss"], textbook_loss(state.params, images / 255, targets)[0], rtol=1e-5)
    assert metrics["tokens"] == ROWS, "an attacked image is no further image"


def test_concurrent_attacks_go_by_the_weights_of_the_step_before():
    step, first = setting(adversarial="concurrent", adversarial_step=STEP)
    batches = [cut(image_batch(seed=seed), 1) for seed in range(3)]
    first = first.replace(carried={"perturbation": jnp.zeros(batches[0]["images"].shape)})
    second, _ = step(first, with_next(*batches[:2]))
    images, targets = batches[0]["images"][0], batches[0]["targets"][0]
    gradient, _ = textbook_gradient(first.params, images, images / 255.0, targets)
    assert_close(change(first, second), gradient)  # the first batch is not attacked

    images, targets = batches[1]["images"][0], batches[1]["targets"][0]
    stale = textbook_attack(first.params, images, targets)
    np.testing.assert_allclose(images / 255 + second.carried["perturbation"][0], stale, atol=1e-6)
    fresh = textbook_attack(second.params, images, targets)
    assert np.mean(np.abs(fresh - stale) > STEP) > 0.02, "the two sets of weights attack otherwise"
    third, _ = step(second, with_next(*batches[1:]))
    gradient, (clean, other) = textbook_gradient(second.params, images, stale, targets)
    assert_close(change(second, third), gradient)
    for name, statistics in (("batch_stats", clean), ("adversarial_batch_stats", other)):
        expected = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, second.model_state[name], statistics)
        assert_close(third.model_state[name], expected)


def needed_inputs(outputs, make):
    """Which leaves of the step's input those of its output depend on that ``outputs`` picks, by the traced program."""
    step, state, batch = make
    jaxpr, shape = jax.make_jaxpr(step, return_shape=True)(state, batch)
    wanted = [outputs(jax.tree_util.keystr(path)) for path, _ in jax.tree.leaves_with_path(shape)]
    assert any(wanted)
    _, used = partial_eval.dce_jaxpr(jaxpr.jaxpr, wanted)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path((state, batch))]
    return {name for name, needed in zip(names, used, strict=True) if needed}


def test_neither_gradient_waits_for_the_other():
    """The attack reads weights and the next batch only, so no gradient of weights; these read no next batch."""
    batches = [cut(image_batch(seed=seed), 2) for seed in range(2)]
    step, state = setting(adversarial="concurrent", microbatches=2)
    state = state.replace(carried={"perturbation": jnp.zeros(batches[0]["images"].shape)})
    made = step, state, with_next(*batches)
    for_attack = needed_inputs(lambda name: "perturbation" in name, made)
    parameters = {name for name in for_attack if ".params" in name}
    assert for_attack - parameters == {"[1]['next_images']", "[1]['next_targets']"}
    assert len(parameters) == len(jax.tree.leaves(state.params))
    for_weights = needed_inputs(lambda name: ".params" in name or ".opt_state" in name, made)
    assert not any("next_" in name for name in for_weights)
    assert {"[1]['images']", "[0].carried['perturbation']"} <= for_weights


def test_a_skipped_step_keeps_statistics_but_attacks_the_next_batch():
    step, state = setting(adversarial="concurrent", adversarial_step=STEP)
    batches = [cut(image_batch(seed=seed), 1) for seed in range(2)]
    state = state.replace(carried={"perturbation": jnp.zeros(batches[0]["images"].shape)})
    batch = with_next(*batches)
    batch["loss_mask"] = np.full_like(batch["loss_mask"], np.nan)
    after, _ = step(state, batch)
    assert int(after.skipped) == 1
    jax.tree.map(np.testing.assert_array_equal, after.model_state, state.model_state)
    expected = textbook_attack(state.params, batch["next_images"][0], batch["next_targets"][0])
    np.testing.assert_allclose(batch["next_images"][0] / 255 + after.carried["perturbation"][0], expected, atol=1e-6)
    broken = state.replace(params=jax.tree.map(lambda x: x * np.nan, state.params))
    assert not np.any(step(broken, batch)[0].carried["perturbation"]), "weights that are no numbers attack nothing"


def test_the_control_moves_pixels_at_random_anew_in_each_step():
    objective = make_objective(PLAIN, TrainConfig(adversarial="noise", adversarial_step=STEP, remat="none"))
    _, state = setting()
    losses = []
    for number in range(2):
        weighed, _ = objective.weighed(cut(image_batch(), 1), jnp.int32(number))
        _, metrics = jax.jit(objective.loss)(state.params, jax.tree.map(lambda x: x[0], weighed))
        losses.append({name: float(metrics[name]) for name in ("loss", "adversarial_loss")})
    assert losses[0]["loss"] == losses[1]["loss"]
    assert len({*losses[0].values(), *losses[1].values()}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("adversarial", ["noise", "sequential", "concurrent"])
def test_eight_devices_do_what_one_does(adversarial):
    outcomes = []
    for shape, devices in ((MeshConfig(1), 1), (MeshConfig(4, 2), 8)):
        rules = Rules.make(shape, jax.devices()[:devices])
        with jax.set_mesh(rules.mesh):
            batches = [
                place_batch(with_next(image_batch(seed=seed), image_batch(seed=seed + 1)), rules, 2)
                for seed in range(3)
            ]
            step, state = setting(rules=rules, microbatches=2, adversarial=adversarial)
            if adversarial == "concurrent":
                objective = make_objective(module_of(MODEL, place=rules.spec), TrainConfig(adversarial=adversarial))
                state = state.replace(carried=jax.jit(objective.carried)(batches[0]))
            for batch in batches:
                state, metrics = step(state, batch)
        outcomes.append(jax.device_get((state.params, state.model_state, metrics)))
    assert_close(outcomes[1], outcomes[0], 1e-3)
