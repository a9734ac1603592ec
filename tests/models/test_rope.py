"""Rotary embedding against the papers' formulas, transcribed pair by pair."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from ml.models import RopeConfig
from ml.models.rope import attention_factor, inverse_frequencies, rotate, rotation

HEAD_DIM = 64


def _plain(theta, pair):
    return theta ** (-2.0 * pair / HEAD_DIM)


def _llama3(frequency, c):
    wavelength = 2 * math.pi / frequency
    if wavelength < c.original_length / c.high_freq_factor:
        return frequency
    if wavelength > c.original_length / c.low_freq_factor:
        return frequency / c.factor
    smooth = (c.original_length / wavelength - c.low_freq_factor) / (c.high_freq_factor - c.low_freq_factor)
    return (1 - smooth) * frequency / c.factor + smooth * frequency


def _pair_that_turns(times, c):
    """By bisection: the real-valued pair index whose frequency turns ``times`` times in the original context."""
    low, high = -1000.0, 1000.0
    for _ in range(200):
        middle = (low + high) / 2
        if c.original_length * _plain(c.theta, middle) / (2 * math.pi) > times:
            low = middle
        else:
            high = middle
    return low


def _yarn(frequency, pair, c):
    first, last = _pair_that_turns(c.beta_fast, c), _pair_that_turns(c.beta_slow, c)
    if c.truncate:
        first, last = math.floor(first), math.ceil(last)
    if pair <= first:
        return frequency
    if pair >= last:
        return frequency / c.factor
    divided = (pair - first) / (last - first)
    return divided * frequency / c.factor + (1 - divided) * frequency


LLAMA3 = RopeConfig(theta=500_000.0, scaling="llama3", factor=8.0, original_length=8192)
YARN = RopeConfig(theta=10_000.0, scaling="yarn", factor=4.0, original_length=4096)
CONFIGS = {
    "none": RopeConfig(theta=50_000.0),
    "linear": RopeConfig(scaling="linear", factor=3.0),
    "llama3": LLAMA3,
    "llama3_other_bands": RopeConfig(
        theta=10_000.0, scaling="llama3", factor=32.0, original_length=1024, low_freq_factor=2.0, high_freq_factor=16.0
    ),
    "yarn": YARN,
    "yarn_untruncated": RopeConfig(
        theta=1e6, scaling="yarn", factor=40.0, original_length=32768, beta_fast=16.0, beta_slow=2.0, truncate=False
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_frequencies_follow_the_formula(name):
    c = CONFIGS[name]
    expected = []
    for pair in range(HEAD_DIM // 2):
        frequency = _plain(c.theta, pair)
        rescaled = {
            "none": lambda f, i: f,
            "linear": lambda f, i: f / c.factor,
            "llama3": lambda f, i: _llama3(f, c),
            "yarn": lambda f, i: _yarn(f, i, c),
        }
        expected.append(rescaled[c.scaling](frequency, pair))
    actual = inverse_frequencies(c, HEAD_DIM)
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    if c.scaling in ("llama3", "yarn"):
        share = np.array(expected) / [_plain(c.theta, pair) for pair in range(HEAD_DIM // 2)]
        assert share.max() == 1  # all three bands are met
        assert share.min() == pytest.approx(1 / c.factor)
        assert ((share > 1.01 / c.factor) & (share < 0.99)).sum() >= 2


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (RopeConfig(), 1.0),
        (LLAMA3, 1.0),
        (RopeConfig(scaling="linear", factor=8.0), 1.0),
        (YARN, 1.1386294361),  # 0.1 ln 4 + 1
        (RopeConfig(scaling="yarn", factor=1.0), 1.0),
        (RopeConfig(scaling="yarn", factor=4.0, attention_factor=0.7), 0.7),
    ],
)
def test_yarn_temperature(config, expected):
    assert attention_factor(config) == pytest.approx(expected)
    cos, sin = rotation(jnp.array([[0, 5]]), config, HEAD_DIM)
    np.testing.assert_allclose(cos**2 + sin**2, expected**2, rtol=1e-5)


def test_rotation_is_multiplication_by_a_complex_phase():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, HEAD_DIM)).astype(np.float32)
    positions = np.array([[0, 1, 2, 0, 1], [7, 100, 101, 2000, 3]])
    cos, sin = rotation(jnp.asarray(positions), LLAMA3, HEAD_DIM)
    half = HEAD_DIM // 2
    phase = np.exp(1j * positions[:, :, None, None] * inverse_frequencies(LLAMA3, HEAD_DIM).astype(np.float64))
    turned = (x[..., :half] + 1j * x[..., half:]) * phase
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(rotate(x, cos, sin), expected, atol=1e-3)


def test_products_depend_on_distance_only():
    rng = np.random.default_rng(0)
    query, key = (jnp.asarray(np.tile(rng.normal(size=(1, 1, 1, HEAD_DIM)), (1, 6, 1, 1)), jnp.float32) for _ in "qk")
    cos, sin = rotation(jnp.array([[0, 3, 10, 13, 50, 53]]), RopeConfig(), HEAD_DIM)
    query, key = rotate(query, cos, sin)[0, :, 0], rotate(key, cos, sin)[0, :, 0]
    products = np.asarray([query[1] @ key[0], query[3] @ key[2], query[5] @ key[4]])
    np.testing.assert_allclose(products, products[0], atol=1e-4)
    assert abs(query[0] @ key[1] - products[0]) > 1e-2  # and on its sign


def test_keeps_the_dtype_of_activations():
    cos, sin = rotation(jnp.array([[1]]), RopeConfig(), 8)
    assert cos.dtype == jnp.float32
    assert rotate(jnp.ones((1, 1, 1, 8), jnp.bfloat16), cos, sin).dtype == jnp.bfloat16
