"""Logits with a cache are the logits without: every architecture option that touches attention."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ml.models import MoEConfig, Transformer, TransformerConfig, init_params
from ml.serve.cached_attention import DecodeAttention, KVCache, PrefillAttention

BASE = TransformerConfig(
    vocab_size=61,
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=48,
    max_length=32,
    init_stddev=0.2,  # large enough that a wrong mask moves the logits by far more than the tolerance
)
ARCHITECTURES = {
    "grouped": {},
    "window": {"sliding_window": 4, "num_kv_heads": 1, "parallel_block": True},
    "patterned_windows": {
        "sliding_window": 4,
        "window_pattern": ("local", "global"),
        "local_rope_theta": 100.0,
        "qk_norm": True,
        "qkv_bias": True,
    },
    "softcap_and_experts": {
        "attention_softcap": 2.0,
        "attention_scale": 0.6,
        "moe": MoEConfig(num_experts=4, top_k=2, mlp_dim=24),
    },
    "learned_positions": {"position_embedding": "learned", "norm": "layer", "num_kv_heads": 4},
}
LENGTHS = np.array([5, 11, 1])
NEW = 6
PAGE_SIZE = 20


@functools.cache
def _model(name):
    model = Transformer(dataclasses.replace(BASE, **ARCHITECTURES[name]))
    return model, jax.jit(init_params, static_argnums=0)(model, jax.random.key(1))


def _tokens(seed=0):
    return np.random.default_rng(seed).integers(0, BASE.vocab_size, (len(LENGTHS), LENGTHS.max() + NEW), dtype=np.int32)


def _uncached(model, params, tokens):
    return np.asarray(jax.jit(functools.partial(model.apply, method="forward"))({"params": params}, tokens))


def _cached(model, params, tokens, chunk=1):
    """Logits of the ``NEW`` tokens after each prompt (teacher forced), and of each prompt's end."""

    @jax.jit
    def apply(tokens, strategy, positions, cache):
        hidden, cache, _ = model.apply({"params": params}, tokens, strategy, positions, cache)
        return model.apply({"params": params}, hidden, method="logits"), cache

    rows = np.arange(len(LENGTHS))[:, None]
    # What is left in the pages from earlier use must not be seen.
    cache = jax.tree.map(lambda x: x + 7.0, KVCache.zeros(model.config, len(LENGTHS), PAGE_SIZE, jnp.float32))
    padded = np.where(np.arange(LENGTHS.max()) < LENGTHS[:, None], tokens[:, : LENGTHS.max()], 60)
    logits, cache = apply(padded, PrefillAttention(), None, cache)
    out = [np.asarray(logits)[rows, LENGTHS[:, None] - 1]]
    for start in range(0, NEW, chunk):
        positions = LENGTHS[:, None] + start + np.arange(chunk)
        logits, cache = apply(tokens[rows, positions], DecodeAttention(jnp.asarray(positions)), positions, cache)
        out.append(np.asarray(logits))
    return np.concatenate(out, axis=1)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_cached_logits_equal_uncached(name):
    model, params = _model(name)
    tokens = _tokens()
    where = LENGTHS[:, None] - 1 + np.arange(NEW + 1)
    expected = _uncached(model, params, tokens)[np.arange(len(LENGTHS))[:, None], where]
    assert expected.std() > 0.3
    np.testing.assert_allclose(_cached(model, params, tokens), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["patterned_windows"])
def test_several_tokens_at_once_equal_one_by_one(name):
    model, params = _model(name)
    np.testing.assert_allclose(_cached(model, params, _tokens(), chunk=3), _cached(model, params, _tokens()), atol=1e-5)


def test_token_beyond_the_page_is_not_stored():
    model, params = _model("grouped")
    cache = KVCache.zeros(model.config, 2, 4, jnp.float32)
    positions = jnp.array([[4], [3]])
    _, cache, _ = model.apply(
        {"params": params}, jnp.ones((2, 1), jnp.int32), DecodeAttention(positions), positions, cache
    )
    written = np.abs(np.asarray(cache.key)).sum(axis=(0, 3, 4))
    assert (written > 0).tolist() == [[False] * 4, [False, False, False, True]]


def test_cache_has_the_dtype_of_activations():
    model = Transformer(BASE, dtype=jnp.bfloat16)
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(1))
    cache = KVCache.zeros(BASE, 1, 8, jnp.bfloat16)
    hidden, cache, _ = model.apply({"params": params}, jnp.ones((1, 4), jnp.int32), PrefillAttention(), None, cache)
    positions = jnp.array([[4]])
    hidden, cache, _ = model.apply(
        {"params": params}, jnp.ones((1, 1), jnp.int32), DecodeAttention(positions), positions, cache
    )
    assert cache.key.dtype == cache.value.dtype == hidden.dtype == jnp.bfloat16
