"""`ml/train/zero_shot.py`: sentences of a class are averaged, and the nearest class is the answer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ml.train.zero_shot import class_embeddings, zero_shot


class Towers:
    """Stands in for the model: an image is its embedding, a text the vector of its tokens."""

    class config:
        features = 3

    def apply(self, variables, *inputs, method):
        x = jnp.asarray(inputs[0], jnp.float32).reshape(len(inputs[0]), -1) * variables["params"]
        return x / jnp.linalg.norm(x, axis=1, keepdims=True)


def encode(texts):
    vectors = {"red a": [4, 0, 0], "red b": [0, 0, 3], "blue a": [0, 1, 0], "blue b": [0, 2, 0]}
    return {"tokens": np.array([vectors[text] for text in texts]), "segment_ids": np.ones((len(texts), 3))}


def test_a_class_is_the_mean_of_its_sentences():
    classes = class_embeddings(Towers(), jnp.ones(()), encode, ["red", "blue"], ["{} a", "{} b"])
    np.testing.assert_allclose(classes, [[0.5**0.5, 0, 0.5**0.5], [0, 1, 0]], atol=1e-6)


def test_the_nearest_class_is_the_answer_and_padding_is_no_image():
    rng = np.random.default_rng(0)
    classes = jnp.asarray(rng.normal(size=(8, 3)))
    classes = classes / jnp.linalg.norm(classes, axis=1, keepdims=True)
    images = rng.normal(size=(20, 3)).astype(np.float32)
    order = np.argsort(-images @ np.asarray(classes).T, axis=1)
    targets = np.where(np.arange(20) < 9, order[:, 0], order[:, 3])
    targets[15:] = order[15:, 6]
    mask = (np.arange(20) != 0).astype(np.float32)
    batches = [
        {"images": images[s].reshape(10, 1, 1, 3), "targets": targets[s, None], "loss_mask": mask[s, None]}
        for s in (slice(0, 10), slice(10, 20))
    ]
    found = zero_shot(Towers(), jax.device_put(1.0), classes, batches)
    assert found.images == 19
    assert found.top1 == pytest.approx(8 / 19) and found.top5 == pytest.approx(14 / 19)
