"""Attention to parts of the keys: parts merge to the float64 softmax, and their gradients add up to the formula's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.flash_attention import flash_attention, partial

BATCH, LENGTH, HEADS, KV_HEADS, WIDTH = 2, 45, 6, 2, 8
BLOCKS = (8, 10)  # neither divides the length, nor a part
SCALE = 0.4

# (window, traced, softcap, segments)
CASES = {
    "causal": (None, False, None, False),
    "window": (7, False, None, False),
    "traced_window_and_segments": (20, True, None, True),
    "softcap_and_segments": (None, False, 1.5, True),
}


def inputs(dtype=np.float32):
    rng = np.random.default_rng(0)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    q, k, v, w = (rng.normal(size=(BATCH, LENGTH, n, WIDTH)).astype(dtype) for n in heads)
    segments = np.sort(rng.integers(1, 4, (BATCH, LENGTH)), axis=1).astype(np.int32)
    return 2 * q, k, v, w, segments


def visible(window, segments):
    row, column = np.arange(LENGTH)[:, None], np.arange(LENGTH)
    seen = (column <= row) & (column > row - (window or LENGTH))
    return seen if segments is None else seen & (segments[:, :, None] == segments[:, None, :])[:, None]


def oracle(q, k, v, segments, window, softcap):
    """Output and log-sum-exp in float64, with the whole matrix."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, HEADS // KV_HEADS, axis=2) for x in (k, v))
    logits = SCALE * np.einsum("bqhd,bkhd->bhqk", q, k)
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    weights = np.where(visible(window, segments), np.exp(logits), 0.0)
    total = weights.sum(-1)
    return np.einsum("bhqk,bkhd->bqhd", weights / total[..., None], v), np.log(total).transpose(0, 2, 1)


def parts():
    """Three parts of the keys, of uneven size and out of order."""
    return np.split(np.random.default_rng(1).permutation(LENGTH).astype(np.int32), [11, 30])


def over_parts(function, window, segments, softcap, k, v, index):
    every = np.arange(LENGTH, dtype=np.int32)
    segment = (None, None) if segments is None else (segments, segments[:, index])
    options = {"window": window, "softcap": softcap, "scale": SCALE, "blocks": BLOCKS}
    return function(k[:, index], v[:, index], every, index, *segment, **options)


def merged(q, k, v, segments, window, softcap):
    results = [
        over_parts(functools.partial(partial.forward, q), window, segments, softcap, k, v, index) for index in parts()
    ]
    return functools.reduce(partial.merge, results)


@pytest.mark.parametrize("name", CASES)
def test_parts_merge_to_the_whole_and_their_gradients_add_up(name):
    window, traced, softcap, packed = CASES[name]
    q, k, v, w, segments = inputs()
    segments = segments if packed else None

    @jax.jit
    def both(q, k, v, moving_window):
        given = moving_window if traced else window
        out, lse = merged(q, k, v, segments, given, softcap)
        backward = functools.partial(partial.backward, q)
        dq, dk, dv = 0.0, jnp.zeros_like(k), jnp.zeros_like(v)
        for index in parts():
            call = lambda k, v, *mask, **options: backward(k, v, out, lse, w, *mask, **options)  # noqa: E731
            part = over_parts(call, given, segments, softcap, k, v, index)
            dq, dk, dv = dq + part[0], dk.at[:, index].add(part[1]), dv.at[:, index].add(part[2])
        return (out, lse), (dq, dk, dv)

    result, gradients = both(q, k, v, window or 0)
    for got, expected in zip(result, oracle(q, k, v, segments, window, softcap), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)

    def formula(q, k, v):
        options = {"segment_ids": segments, "window": window, "softcap": softcap, "scale": SCALE}
        return (w * flash_attention(q, k, v, implementation="reference", **options)).sum()

    for got, expected in zip(gradients, jax.jit(jax.grad(formula, (0, 1, 2)))(q, k, v), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


def test_merging_is_associative_and_nothing_is_its_neutral_element():
    q, k, v, _, _ = inputs()
    results = [over_parts(functools.partial(partial.forward, q), 9, None, None, k, v, index) for index in parts()]
    assert any(np.isneginf(lse).any() for _, lse in results), "some query should see none of a part"
    assert all(np.all(np.asarray(out)[np.isneginf(lse)] == 0) for out, lse in results)
    a, b, c = results
    one, other = partial.merge(partial.merge(a, b), c), partial.merge(a, partial.merge(c, b))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), one, other)
    nothing = jnp.zeros_like(a[0]), jnp.full_like(a[1], -jnp.inf)
    jax.tree.map(np.testing.assert_array_equal, partial.merge(a, nothing), a)
    jax.tree.map(np.testing.assert_array_equal, partial.merge(nothing, nothing), nothing)


@pytest.mark.parametrize("window", [None, 1, 13, 200])
def test_the_blocks_to_compute_are_those_in_which_somebody_sees_something(window):
    query_index, key_index = np.arange(17, 17 + 32), np.arange(60)
    row, column = query_index[:, None], key_index
    seen = (column <= row) & (column > row - (window or 1000))
    expected = seen.reshape(4, 8, 6, 10).any(axis=(1, 3))
    np.testing.assert_array_equal(partial.visible_blocks(query_index, key_index, window, BLOCKS), expected)
    traced = jax.jit(partial.visible_blocks, static_argnums=3)(query_index, key_index, window, BLOCKS)
    np.testing.assert_array_equal(traced, expected)


@pytest.mark.parametrize("hidden", [slice(30, None), slice(0, 10)], ids=["future", "past"])
def test_blocks_that_nobody_sees_are_not_computed(hidden):
    """A value that is not a number, times the weight 0, would be not a number."""
    q, k, v, w, _ = inputs()
    index = np.arange(LENGTH, dtype=np.int32)
    rows = slice(16, 24)  # one block of queries, which sees the block of keys 10 to 19 and that from 20 to 29
    v = v.copy()
    v[:, hidden] = np.nan
    options = {"window": 7, "scale": SCALE, "blocks": BLOCKS}
    out, lse = partial.forward(q[:, rows], k, v, index[rows], index, **options)
    assert np.isfinite(out).all()
    dq, dk, _ = partial.backward(q[:, rows], k, v, out, lse, w[:, rows], index[rows], index, **options)
    assert np.isfinite(dq).all() and np.isfinite(dk).all()


def test_bfloat16_stays_within_a_percent():
    *rounded, _, _ = (jnp.asarray(x, jnp.bfloat16) for x in inputs())
    out, lse = merged(*rounded, None, None, None)
    assert out.dtype == lse.dtype == jnp.float32
    expected, _ = oracle(*rounded, None, None, None)
    assert np.sqrt(np.mean((out - expected) ** 2)) < 0.01 * np.sqrt(np.mean(expected**2))


def test_memory_grows_with_length_not_its_square():
    def memory(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        rows = jax.ShapeDtypeStruct((1, length, 2), jnp.float32)

        def both(q, k, v, out, lse, dout):
            index = jnp.arange(length)
            forward = partial.forward(q, k, v, index, index, scale=SCALE, blocks=(32, 64))
            backward = partial.backward(q, k, v, out, lse, dout, index, index, scale=SCALE, blocks=(32, 64))
            return forward, backward

        return jax.jit(both).lower(x, x, x, x, rows, x).compile().memory_analysis().temp_size_in_bytes

    assert memory(4096) < 2.2 * memory(2048)
    assert memory(4096) < 0.2 * 4096**2 * 4  # less than a fifth of one head's scores


@pytest.mark.parametrize(
    ("length", "expected"), [(1, (1, 1)), (300, (150, 300)), (512, (256, 512)), (1001, (251, 501))]
)
def test_blocks_fit_the_length(length, expected):
    assert partial.fit_blocks(length) == expected
