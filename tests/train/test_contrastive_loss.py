"""`ml/train/contrastive_loss.py` against float64 NumPy, and against itself on eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ml.parallel import MeshConfig, Rules
from ml.plan.collectives import by_axes, collectives
from ml.train.contrastive_loss import contrastive_loss

FEATURES, LOG_SCALE = 6, 0.3


def pairs(count, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, FEATURES))
    y = x + rng.normal(size=x.shape)
    return tuple((v / np.linalg.norm(v, axis=1, keepdims=True)).astype(np.float32) for v in (x, y))


def reference(x, y, log_scale):
    """Loss, hits of images and of texts, and the gradients of all three, in float64."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    a, eye = np.exp(log_scale) * x @ y.T, np.eye(len(x))
    rows, columns = (np.exp(a) / np.exp(a).sum(axis=axis, keepdims=True) for axis in (1, 0))
    loss = -(np.log(np.diag(rows)) + np.log(np.diag(columns))).sum() / 2
    of_a = (rows + columns) / 2 - eye
    hits = [(a.argmax(axis=axis) == np.arange(len(x))).sum() for axis in (1, 0)]
    factor = np.exp(log_scale)
    return loss, hits, (factor * of_a @ y, factor * of_a.T @ x, (of_a * a).sum())


def both(x, y, mask, block):
    return compiled(x, y, mask, block)(x, y, jnp.float32(LOG_SCALE), mask)


def compiled(x, y, mask, block):
    def loss(x, y, log_scale, mask):
        return contrastive_loss(x, y, log_scale, mask, block)

    of_all = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    return of_all.lower(x, y, jnp.float32(LOG_SCALE), mask).compile()


@pytest.mark.parametrize("block", [0, 4])
def test_loss_and_gradients_in_float64_and_padding_is_nobodys_negative(block):
    x, y = pairs(14)
    mask = np.ones(14, np.float32)
    mask[[3, 13]] = 0
    kept = mask > 0
    (loss, hits), gradients = both(x, y, mask, block)
    expected, expected_hits, expected_gradients = reference(x[kept], y[kept], LOG_SCALE)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert list(map(float, hits)) == expected_hits and 0 < min(expected_hits) < max(expected_hits) + 1 <= 12
    for found, wanted in zip(gradients[:2], expected_gradients[:2], strict=True):
        np.testing.assert_allclose(found[kept], wanted, atol=1e-6)
        assert not np.any(found[~kept])
    assert gradients[2] == pytest.approx(expected_gradients[2], rel=1e-5)


def test_a_large_scale_overflows_nothing():
    x, y = pairs(8)
    loss, _ = contrastive_loss(x, y, jnp.float32(np.log(1000)), jnp.ones(8), 3)
    a = 1000 * x.astype(np.float64) @ y.astype(np.float64).T
    expected = (np.logaddexp.reduce(a, axis=1) + np.logaddexp.reduce(a, axis=0)).sum() / 2 - np.trace(a)
    assert loss == pytest.approx(expected, rel=1e-5)


def test_on_eight_devices_each_pair_has_all_others_as_negatives():
    x, y = pairs(48)
    mask = (np.arange(48) != 21).astype(np.float32)
    (loss, hits), gradients = both(x, y, mask, 0)
    rules = Rules.make(MeshConfig(data=2, fsdp=4))
    with jax.set_mesh(rules.mesh):
        placed = [jax.device_put(v, rules.sharding("batch", *[None] * (v.ndim - 1))) for v in (x, y, mask)]
        program = compiled(*placed, 4)
        (on_mesh, hits_on_mesh), gradients_on_mesh = program(*placed[:2], jnp.float32(LOG_SCALE), placed[2])
    assert on_mesh == pytest.approx(float(loss), rel=1e-6) and list(hits_on_mesh) == list(hits)
    for found, wanted in zip(gradients_on_mesh, gradients, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=2e-6)
    assert gradients_on_mesh[1].sharding.shard_shape((48, FEATURES)) == (6, FEATURES)
    # Texts are gathered for each of two passes, or for both if the compiler sees that it is the same, along one axis
    # after the other; their gradient goes the other way.
    sent = {key: size for key, (size, _) in by_axes(collectives(program.as_text(), rules.mesh.shape)).items()}
    whole, numbers = 48 * FEATURES * 4, 48 * 4
    assert whole / 2 <= sent["all-gather", ("data",)] <= 2 * whole / 2 + 3 * numbers
    assert whole / 2 * 3 / 4 <= sent["all-gather", ("fsdp",)] <= (2 * whole + 3 * numbers) / 2 * 3 / 4
    assert sent["reduce-scatter", ("data",)] == whole / 2
    assert sent["reduce-scatter", ("fsdp",)] == whole / 2 * 3 / 4
    assert sum(size for (kind, _), size in sent.items() if kind == "all-reduce") < 6 * numbers
