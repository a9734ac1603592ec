"""`ml/train/contrastive.py`: the gradient of a whole batch in the memory of a part; naive accumulation is another."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ml.train.contrastive import Embedded, merged, two_pass_value_and_grad
from ml.train.contrastive_loss import contrastive_loss

WIDTH, FEATURES = 12, 5
PARTS, ROWS = 4, 6


def parameters(width=WIDTH, layers=1):
    rng = np.random.default_rng(0)
    names = ("image", "text")
    towers = {
        name: {
            "layers": rng.normal(size=(layers, width, width)) * width**-0.5,
            "out": rng.normal(size=(width, FEATURES)),
        }
        for name in names
    }
    return jax.tree.map(jnp.float32, towers | {"logit": {"scale": np.array(1.0)}})


def batch(parts=PARTS, rows=ROWS, width=WIDTH, dropout=True):
    rng = np.random.default_rng(1)
    image = rng.normal(size=(parts, rows, width)).astype(np.float32)
    made = {"image": image, "text": (image + rng.normal(size=image.shape)).astype(np.float32)}
    return made | ({"keys": jax.random.split(jax.random.key(0), parts)} if dropout else {})


def embed(params, batch):
    """Two towers with dropout, whose key is in the batch."""

    def tower(name):
        x = batch[name]
        for kernel in params[name]["layers"]:
            x = jnp.tanh(x @ kernel)
            if "keys" in batch:
                x = x * jax.random.bernoulli(batch["keys"], 0.8, x.shape) / 0.8
        x = x @ params[name]["out"]
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    return tower("image"), tower("text")


def loss(head, embeddings, batch, block=0):
    images, texts = embeddings
    total, hits = contrastive_loss(images, texts, head["logit"]["scale"], jnp.ones(len(images)), block)
    return total / len(images), {"hits": hits[0], "rows": batch["image"].shape[0]}


def head(params):
    return {"logit": params["logit"]}


def relative(found, wanted):
    """The distance between gradients, as a share of their length."""
    difference = jax.tree.map(jnp.subtract, found, wanted)
    norm = [np.sqrt(sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(tree))) for tree in (difference, wanted)]
    return norm[0] / norm[1]


def in_one_pass(params, whole):
    """The loss of all pairs, differentiated through all embeddings at once."""
    parts = jax.vmap(embed, in_axes=(None, 0))(params, whole)
    embeddings = jax.tree.map(lambda x: x.reshape(-1, FEATURES), parts)
    return loss(head(params), embeddings, {"image": embeddings[0]})[0]


def test_two_passes_are_the_gradient_of_the_whole_batch_and_naive_accumulation_is_not(quick_compilation):
    params, whole = parameters(), batch()
    expected, wanted = jax.jit(jax.value_and_grad(in_one_pass))(params, whole)
    (found, metrics), gradients = jax.jit(two_pass_value_and_grad(Embedded(embed, loss, head)))(params, whole)
    assert found == pytest.approx(float(expected), rel=1e-6) and metrics["rows"] == PARTS * ROWS
    assert relative(gradients, wanted) < 1e-5
    assert relative(head(gradients), head(wanted)) < 1e-5 and abs(wanted["logit"]["scale"]) > 1e-2

    def of_part(params, part):
        return loss(head(params), embed(params, part), part)[0]

    naive = jax.jit(jax.vmap(jax.grad(of_part), in_axes=(None, 0)))(params, whole)
    assert relative(jax.tree.map(lambda x: x.mean(axis=0), naive), wanted) > 0.1


def test_a_single_microbatch_takes_one_pass(quick_compilation):
    params = parameters()
    whole = batch(parts=1, rows=PARTS * ROWS, dropout=False)
    cut = jax.tree.map(lambda x: x.reshape(PARTS, ROWS, WIDTH), whole)
    embeds = []

    def counted(params, batch):
        embeds.append(1)
        return embed(params, batch)

    (once, _), gradients = jax.jit(two_pass_value_and_grad(Embedded(counted, loss, head)))(params, whole)
    assert len(embeds) == 1
    (twice, _), others = jax.jit(two_pass_value_and_grad(Embedded(embed, loss, head)))(params, cut)
    assert once == pytest.approx(float(twice), rel=1e-6) and relative(gradients, others) < 1e-5


def test_rows_are_merged_shard_by_shard_and_keys_are_left_out():
    together = merged({"x": jnp.arange(6).reshape(2, 3), "keys": jax.random.split(jax.random.key(0), 2)})
    np.testing.assert_array_equal(together["x"], [0, 3, 1, 4, 2, 5])
    assert together["keys"] is None


def planned(rows, parts, width=512):
    """Bytes of temporaries of a step on ``parts`` microbatches of ``rows``."""
    params = jax.eval_shape(functools.partial(parameters, width, layers=1))
    shapes = jax.eval_shape(functools.partial(batch, parts, rows, width, dropout=False))
    step = two_pass_value_and_grad(Embedded(embed, functools.partial(loss, block=16), head))
    return jax.jit(step).lower(params, shapes).compile().memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_the_number_of_microbatches():
    few, many, at_once = planned(64, 2), planned(64, 16), planned(1024, 1)
    kept = 2 * 64 * 512 * 4  # what tanh leaves for the backward pass of a microbatch, in both towers
    assert many - few < kept / 2 and at_once - few > 6 * kept
