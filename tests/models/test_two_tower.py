"""The two towers: what an embedding depends on, and that the parameters are those that names say."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ml.models.huggingface.names import leaf_shapes
from ml.models.two_tower import TwoTower
from ml.models.two_tower_config import TwoTowerConfig, ViTConfig, text_tower
from ml.models.vit import patched

IMAGE = ViTConfig(image_size=8, patch_size=4, num_layers=2, embed_dim=16, num_heads=2, mlp_dim=32, pre_norm=True)
TEXT = text_tower(vocab_size=32, num_layers=1, embed_dim=8, num_heads=2, max_length=6)
CONFIG = TwoTowerConfig(IMAGE, TEXT, features=4)


def shapes(config):
    images = jnp.zeros((1, config.image.image_size, config.image.image_size, config.image.channels))
    return jax.eval_shape(
        lambda: nn.meta.unbox(TwoTower(config).init(jax.random.key(0), images, jnp.zeros((1, 1), jnp.int32)))["params"]
    )


@pytest.fixture(scope="module")
def embedded():
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, jnp.float32), shapes(CONFIG))
    apply = jax.jit(lambda *batch: TwoTower(CONFIG).apply({"params": params}, *batch))
    return lambda *batch: [np.asarray(x) for x in apply(*batch)]


def example():
    rng = np.random.default_rng(1)
    images = rng.normal(size=(3, 8, 8, 3)).astype(np.float32)
    segments = (np.arange(6) < np.array([[6], [4], [3]])).astype(np.int32)
    return images, rng.integers(1, 32, (3, 6)).astype(np.int32), segments


def test_a_text_is_read_at_its_last_token_and_an_image_as_a_whole(embedded):
    images, tokens, segments = example()
    x, y = embedded(images, tokens, segments)
    np.testing.assert_allclose([np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1)], 1, rtol=1e-5)
    padding, first, last = tokens.copy(), tokens.copy(), tokens.copy()
    padding[1, 4:] += 1
    first[1, 0] -= 1
    last[1, 3] -= 1
    np.testing.assert_allclose(embedded(images, padding, segments)[1], y, atol=1e-6)
    for changed in (first, last):
        moved = np.abs(embedded(images, changed, segments)[1] - y).max(axis=1)
        assert moved[1] > 1e-3 and moved[[0, 2]].max() < 1e-6
    corner = images.copy()
    corner[2, -1, -1] += 1
    moved = np.abs(embedded(corner, tokens, segments)[0] - x).max(axis=1)
    assert moved[2] > 1e-3 and moved[:2].max() < 1e-6


def test_patches_are_squares_in_order():
    images = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    cut = patched(jnp.asarray(images), 2)
    assert cut.shape == (2, 6, 12)
    np.testing.assert_array_equal(cut[1, 4], images[1, 2:4, 2:4].transpose(2, 0, 1).ravel())


@pytest.mark.parametrize("image", [IMAGE, dataclasses.replace(IMAGE, pre_norm=False)], ids=["clip", "plain"])
def test_parameters_are_what_names_say(image):
    config = dataclasses.replace(CONFIG, image=image)
    made = {"/".join(key.key for key in path): leaf for path, leaf in jax.tree.leaves_with_path(shapes(config))}
    assert {path: leaf.shape for path, leaf in made.items()} == leaf_shapes(config)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="patch_size=3 does not divide image_size=8"):
        dataclasses.replace(IMAGE, patch_size=3)
    with pytest.raises(ValueError, match=r"text\.tie_embeddings=False"):
        dataclasses.replace(CONFIG, text=dataclasses.replace(TEXT, tie_embeddings=False))
