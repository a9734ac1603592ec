"""Storing in the paged cache: where tokens land, what padding does, that nothing is copied, and how exact it is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import QUANTIZED, PagedCache, quantize, slots, write

PAGE, HEADS, DIM = 4, 2, 8


def tokens(count, seed=0):
    rng = np.random.default_rng(seed)
    return (jnp.asarray(rng.normal(size=(count, HEADS, DIM)), jnp.float32) for _ in range(2))


def test_slots():
    table = jnp.asarray([[5, 2], [7, 0]], jnp.int32)
    sequence = jnp.asarray([0, 0, 1, 1, -1, 0, 1, 0])
    position = jnp.asarray([0, 5, 3, 4, 0, 8, -1, 7])
    expected = [5 * PAGE, 2 * PAGE + 1, 7 * PAGE + 3, 0, -1, -1, -1, 2 * PAGE + 3]
    assert slots(table, sequence, position, PAGE).tolist() == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("layer", [1, jnp.int32(1)], ids=["static", "traced"])
def test_write(dtype, layer):
    """Against a loop over the tokens; padding, also when it is the last page that -1 would name, stays out."""
    cache = PagedCache.zeros(2, 3, PAGE, HEADS, DIM, dtype)
    cache = jax.tree.map(lambda x: x + jnp.asarray(3, x.dtype), cache)
    key, value = tokens(5)
    slot = [9, -1, 0, 6, -1]
    stored = jax.jit(write)(cache, layer, key, value, jnp.asarray(slot, jnp.int32))
    new = {"key": key, "value": value}
    if dtype in QUANTIZED:
        for name in ("key", "value"):
            new[name], new[f"{name}_scale"] = quantize(new[name], dtype)
    for name, rows in new.items():
        expected = np.array(getattr(cache, name))
        for t, where in enumerate(slot):
            if where >= 0:
                page, offset = divmod(where, PAGE)
                place = (1, page, slice(None), offset) if name.endswith("scale") else (1, page, offset)
                expected[place] = np.asarray(rows[t].astype(getattr(cache, name).dtype))
        np.testing.assert_array_equal(np.asarray(getattr(stored, name)), expected, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_write_is_in_place(dtype):
    """Donated, or carried through a loop: the result is where the operand was, and no copy is made on the way."""
    cache = PagedCache.zeros(2, 512, PAGE, HEADS, DIM, dtype)
    key, value = tokens(3)
    slot = jnp.asarray([4, -1, 9], jnp.int32)

    def several(cache, key, value, slot):
        return jax.lax.fori_loop(0, 4, lambda i, cache: write(cache, i % 2, key, value, slot + i), cache)

    for function in (functools.partial(write, layer=1), several):
        compiled = jax.jit(function, donate_argnames="cache").lower(cache=cache, key=key, value=value, slot=slot)
        memory = compiled.compile().memory_analysis()
        stored = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
        assert memory.alias_size_in_bytes == stored
        assert memory.temp_size_in_bytes < stored / 8


@pytest.mark.parametrize("dtype", sorted(QUANTIZED))
def test_quantize_error(dtype):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(64, DIM)) * np.exp(rng.normal(size=(64, 1)) * 3)
    rounded, scale = quantize(jnp.asarray(x, jnp.float32), dtype)
    assert (rounded.dtype, scale.dtype, scale.shape) == (dtype, jnp.float32, (64,))
    error = np.abs(np.asarray(rounded, np.float64) * np.asarray(scale, np.float64)[:, None] - x)
    largest = np.abs(x).max(axis=1, keepdims=True)
    # int8: half a step of 1 / 127. float8 with 3 bits of mantissa: half of 1 / 8 of the power of two below, and below
    # the least normal number, 2 ** -6, half a step of 2 ** -9.
    bound = largest / 127 / 2 if dtype == "int8" else np.maximum(np.abs(x) / 16, largest / 448 * 2**-10)
    assert (error <= bound * (1 + 1e-5)).all()
    assert error.max() > 0


@pytest.mark.parametrize("dtype", sorted(QUANTIZED))
def test_quantize_zero_and_greatest(dtype):
    rounded, scale = quantize(jnp.asarray([[0.0, 0.0], [-5.0, 5.0]]), dtype)
    assert scale[0] == 0
    np.testing.assert_array_equal(np.asarray(rounded[0], np.float32), 0)
    np.testing.assert_array_equal(np.asarray(rounded[1], np.float32), np.array([-1, 1]) * QUANTIZED[dtype])


def test_a_new_cache():
    assert PagedCache.zeros(1, 2, PAGE, HEADS, DIM, "bfloat16").quantized is False
    cache = PagedCache.zeros(1, 2, PAGE, HEADS, DIM, "int8")
    assert (cache.quantized, cache.page_size, cache.key_scale.shape) == (True, PAGE, (1, 2, HEADS, PAGE))
