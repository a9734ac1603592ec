"""Weights of 8 bits: operations stay within the rounding that absmax / 127 allows, and are exact for what is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ml.weights import Int8, dot, materialize, quantize, ragged_dot, take

RANDOM = np.random.default_rng(0)
# Einsum, shapes of activations and weight: all contractions that models write.
PRODUCTS = {
    "query": ("ble,ehd->blhd", (2, 3, 40), (40, 3, 5)),
    "out": ("blhd,hde->ble", (2, 3, 3, 5), (3, 5, 40)),
    "up": ("ble,em->blm", (2, 3, 40), (40, 24)),
    "tied logits": ("ble,ve->blv", (2, 3, 40), (23, 40)),
    "turned": ("te,ehd->dht", (4, 40), (40, 3, 5)),
}


def weight(*shape):
    """Normal, and of a size that differs a hundredfold along every axis, so that no two scales may be confused."""
    w = RANDOM.normal(size=shape)
    for axis, size in enumerate(shape):
        w *= np.geomspace(0.1, 10, size).reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return w.astype(np.float32)


def summed_axes(spec):
    of_w, of_out = spec.split(",")[1].split("->")
    return tuple(i for i, label in enumerate(of_w) if label not in of_out)


def step(w, axes):
    """What one whole number stands for, of each channel; in float64, from the float weight alone."""
    return np.abs(w.astype(np.float64)).max(axis=axes, keepdims=True) / 127


@pytest.mark.parametrize("spec, of_x, of_w", PRODUCTS.values(), ids=PRODUCTS)
def test_dot(spec, of_x, of_w):
    x, w = RANDOM.normal(size=of_x).astype(np.float32), weight(*of_w)
    axes = summed_axes(spec)
    leaf = quantize(jnp.asarray(w), axes)
    y = np.asarray(dot(spec, jnp.asarray(x), leaf), np.float64)
    # Each weight is off by at most half a step; what float32 rounds besides is far below a thousandth of that.
    bound = np.einsum(spec, np.abs(x), np.broadcast_to(step(w, axes) / 2, w.shape))
    error = np.abs(y - np.einsum(spec, x.astype(np.float64), w.astype(np.float64)))
    assert (error <= 1.001 * bound).all()
    assert (error > bound / 100).mean() > 0.5, "the bound says something"
    kept = np.asarray(leaf.values, np.float64) * np.asarray(leaf.scale, np.float64)
    exact = np.einsum(spec, x.astype(np.float64), kept)
    assert (np.abs(y - exact) <= 1e-6 * np.einsum(spec, np.abs(x), np.abs(kept))).all()


def test_ragged_dot_scales_each_row_by_its_own_group():
    x, w = RANDOM.normal(size=(11, 40)).astype(np.float32), weight(4, 40, 6)
    sizes = np.array([3, 0, 5, 2])  # the last row is nobody's
    leaf = quantize(jnp.asarray(w), (1,))
    y = np.asarray(ragged_dot(jnp.asarray(x), jnp.asarray(sizes), leaf))
    group = np.repeat(np.arange(4), sizes)
    bound = np.abs(x[:10]).sum(axis=1, keepdims=True) * step(w, (1,))[group, 0] / 2
    exact = np.einsum("ri,rio->ro", x[:10].astype(np.float64), w[group].astype(np.float64))
    assert (np.abs(y[:10] - exact) <= 1.001 * bound).all()
    np.testing.assert_array_equal(y[10], 0)


def test_take_scales_each_row():
    w, indices = weight(23, 40), np.array([[3, 22, 0], [3, 7, 8]])
    leaf = quantize(jnp.asarray(w), (1,))
    rows = take(jnp.asarray(indices), leaf)
    assert rows.dtype == jnp.float32
    # Half a step, and the rounding of a product in float32.
    assert (np.abs(rows - w[indices]) <= step(w, (1,))[indices] / 2 + 1e-6 * np.abs(w[indices])).all()


@pytest.mark.parametrize("axes", [(1,), (2,), (1, 2)])
def test_what_a_leaf_stands_for_is_off_by_half_a_step(axes):
    w = weight(3, 20, 7)
    leaf = quantize(jnp.asarray(w), axes)
    assert leaf.values.dtype == jnp.int8 and np.abs(leaf.values).max() == 127
    np.testing.assert_allclose(leaf.scale, step(w, axes), rtol=1e-6)
    assert (np.abs(materialize(leaf) - w) <= step(w, axes) / 2 + 1e-6 * np.abs(w)).all()


def test_results_have_the_dtype_of_activations():
    leaf = quantize(jnp.asarray(weight(3, 4)), (0,))
    experts = Int8(leaf.values[None], leaf.scale[None])
    x = jnp.ones((5, 3), jnp.bfloat16)
    assert dot("se,ed->sd", x, leaf).dtype == jnp.bfloat16
    assert ragged_dot(x, jnp.array([5]), experts).dtype == jnp.bfloat16
    table = quantize(jnp.asarray(weight(3, 4)), (1,))
    assert take(jnp.array([0]), table, dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_channels_of_nothing_and_channels_that_are_broken():
    w = np.ones((4, 5), np.float32)
    w[:, 0], w[:, 1], w[2, 2], w[2, 3] = 0, 1e-41, np.nan, np.inf
    dense = np.asarray(materialize(quantize(jnp.asarray(w), (0,))))
    np.testing.assert_allclose(dense[:, [0, 1, 4]], w[:, [0, 1, 4]], atol=1e-40)
    assert np.isnan(dense[:, 2]).all() and np.isnan(dense[:, 3]).all(), "what is broken stays so"


def test_a_scale_that_varies_along_what_is_summed_is_refused():
    leaf = quantize(jnp.asarray(weight(4, 4)), (0,))
    for operation in (
        lambda: dot("se,ve->sv", jnp.ones((2, 4)), leaf),
        lambda: take(jnp.array([0]), leaf),
        lambda: ragged_dot(jnp.ones((2, 4)), jnp.array([2]), quantize(jnp.ones((1, 4, 4)), (2,))),
    ):
        with pytest.raises(ValueError, match="quantize it over these axes"):
            operation()


@pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="JAX 0.10's CPU compiler converts the whole before the loop over its layers"
)
def test_no_float_copy_is_made_to_round_a_stacked_kernel():
    w = jax.ShapeDtypeStruct((8, 256, 512), jnp.bfloat16)
    planned = quantize.lower(w, (1,)).compile().memory_analysis()
    assert planned.temp_size_in_bytes < 4 * 2 * w.size / 8
