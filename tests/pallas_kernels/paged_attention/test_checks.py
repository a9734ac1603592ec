"""Operands that do not fit: every message names the argument and what is allowed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from pallas_kernels.paged_attention import PagedCache, paged_attention


def operands(dtype="float32"):
    return {
        "query": jnp.zeros((2, 4, 8)),
        "cache": PagedCache.zeros(1, 6, 16, 2, 8, dtype),
        "block_table": jnp.asarray([[0, 1, 2], [3, 4, 5]], jnp.int32),
        "lengths": jnp.asarray([40, 48], jnp.int32),
        "query_starts": None,
        "starts": None,
    }


def call(implementation="reference", **arguments):
    arguments = operands() | arguments
    tables = [arguments.pop(name) for name in ("block_table", "lengths", "query_starts")]
    return paged_attention(
        arguments.pop("query"), arguments.pop("cache"), 0, *tables, implementation=implementation, **arguments
    )


def cache_with(dtype="float32", **fields):
    return dataclasses.replace(operands(dtype)["cache"], **fields)


INTS = jnp.int32
BAD_OPERANDS = {
    "query rank": ({"query": jnp.zeros((2, 32))}, r"query has shape \(2, 32\); it must be \[tokens, heads, head_dim\]"),
    "cache rank": (
        {"cache": cache_with(key=jnp.zeros((6, 16, 2, 8)))},
        r"cache.key has shape \(6, 16, 2, 8\); it must be \[layers, pages, page_size, kv_heads, head_dim\]",
    ),
    "value": (
        {"cache": cache_with(value=jnp.zeros((1, 6, 16, 2, 8), jnp.bfloat16))},
        r"cache.value is bfloat16\[1, 6, 16, 2, 8\]; it must be as cache.key, float32\[1, 6, 16, 2, 8\]",
    ),
    "head_dim": ({"query": jnp.zeros((2, 4, 16))}, "query has head_dim 16, the cache 8; they must be equal"),
    "heads": ({"query": jnp.zeros((2, 3, 8))}, "query has 3 heads; it must be a multiple of the cache's 2 kv_heads"),
    "query type": (
        {"query": jnp.zeros((2, 4, 8), jnp.int8)},
        "query has dtype int8; allowed are float32, bfloat16, float16",
    ),
    "cache type": (
        {"cache": cache_with(key=jnp.zeros((1, 6, 16, 2, 8), INTS), value=jnp.zeros((1, 6, 16, 2, 8), INTS))},
        "cache.key has dtype int32; allowed are float32, bfloat16, float16, int8, float8_e4m3fn",
    ),
    "no scale": (
        {"cache": cache_with("int8", key_scale=None)},
        "cache.key_scale must be given for int8 and float8_e4m3fn caches, and for no other",
    ),
    "needless scale": (
        {"cache": cache_with(value_scale=jnp.zeros((1, 6, 2, 16)))},
        "cache.value_scale must be given for int8 and float8_e4m3fn caches, and for no other",
    ),
    "scale shape": (
        {"cache": cache_with("int8", value_scale=jnp.zeros((1, 6, 16, 2)))},
        r"cache.value_scale has shape \(1, 6, 16, 2\); it must be .* here \(1, 6, 2, 16\)",
    ),
    "table rank": (
        {"block_table": jnp.zeros(2, INTS)},
        r"block_table has shape \(2,\); it must be \[sequences, pages_per_sequence\]",
    ),
    "lengths": ({"lengths": jnp.zeros(3, INTS)}, r"lengths has shape \(3,\); it must be \(2,\)"),
    "starts": ({"starts": jnp.zeros(3, INTS)}, r"starts has shape \(3,\); it must be \(2,\)"),
    "rows": ({"query": jnp.zeros((3, 4, 8))}, "query has 3 rows for 2 sequences; without query_starts"),
    "query_starts": ({"query_starts": jnp.zeros(2, INTS)}, r"query_starts has shape \(2,\); it must be \(3,\)"),
    "integer type": ({"lengths": jnp.zeros(2)}, "lengths has dtype float32; it must be int32"),
    "implementation": ({"implementation": "triton"}, "implementation=.triton.; choose auto, xla, cpu, gpu, tpu, ref"),
}
BAD_TABLES = {
    "too long": ({"lengths": [40, 49]}, r"lengths must lie in 0 .. 48, .* entry \(1,\) does not"),
    "negative": ({"lengths": [-1, 48]}, r"lengths must lie in 0 .. 48, .* entry \(0,\) does not"),
    "no such page": (
        {"block_table": [[0, 1, 2], [3, 6, 5]]},
        r"block_table must hold pages 0 .. 5 up to a row's length; entry \(1, 1\) does not",
    ),
    "negative page": (
        {"block_table": [[0, 1, -1], [3, 4, 5]]},
        r"block_table must hold pages .* entry \(0, 2\) does not",
    ),
    "start inside a page": ({"starts": [0, 8]}, r"starts must be multiples of the page size 16; entry \(1,\) does not"),
    "falling": ({"query_starts": [0, 2, 1]}, r"query_starts must rise by 0 .. lengths\[s\] .* entry \(1,\) does not"),
    "more rows than tokens": (
        {"query_starts": [0, 1, 2], "lengths": [0, 48]},
        r"query_starts must rise by 0 .. lengths\[s\] .* entry \(0,\) does not",
    ),
}


@pytest.mark.parametrize("name", BAD_OPERANDS)
def test_operands(name):
    arguments, message = BAD_OPERANDS[name]
    with pytest.raises(ValueError, match=message):
        call(**arguments)


@pytest.mark.parametrize("name", BAD_TABLES)
def test_concrete_tables(name):
    arguments, message = BAD_TABLES[name]
    with pytest.raises(ValueError, match=message):
        call(**{key: jnp.asarray(x, INTS) for key, x in arguments.items()})


@pytest.mark.parametrize("name", BAD_TABLES)
def test_traced_tables(name):
    """Under checkify the same message."""
    arguments, message = BAD_TABLES[name]
    arguments = {key: jnp.asarray(x, INTS) for key, x in arguments.items()}
    error, _ = checkify.checkify(jax.jit(lambda x: call(**x, checked=True)))(arguments)
    with pytest.raises(checkify.JaxRuntimeError, match=message.split(";")[0].split(", .*")[0].split(" .* entry")[0]):
        error.throw()


def test_traced_tables_unchecked():
    """Nothing is checked, and the function has no effect, which would cost each call of it JAX's slow dispatch."""
    wrong = jnp.asarray([0, 8], INTS)
    jax.jit(lambda x: call(starts=x))(wrong)
    assert not jax.make_jaxpr(lambda x: call(starts=x))(wrong).effects
    assert jax.make_jaxpr(lambda x: call(starts=x, checked=True))(wrong).effects


def test_good_tables():
    """The edges of what is allowed, and garbage beyond a row's length."""
    table = jnp.asarray([[0, 1, 10**6], [3, -4, 5]], INTS)
    lengths = jnp.asarray([32, 0], INTS)
    assert np.isfinite(call("xla", block_table=table, lengths=lengths)).all()
    error, _ = checkify.checkify(jax.jit(lambda x: call("xla", block_table=x, lengths=lengths, checked=True)))(table)
    error.throw()
