"""Logits with a cache are the logits without: every architecture option that touches attention."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ml.models import MoEConfig, Transformer, TransformerConfig, init_params
from ml.serve.cached_attention import PagedAttention, empty_cache
from pallas_kernels.shared_prefix_attention import Crossover, make_plan

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
LENGTHS = np.array([5, 11, 1], np.int32)
NEW = 6
PAGE_SIZE = 4
# Pages lie anywhere in the cache; the last of each row is a page too many, which nobody may touch.
BLOCK_TABLE = np.array([[7, 2, 12, 99, 99], [3, 11, 0, 14, 1], [9, 4, 99, 99, 99]], np.int32)
PAGES = 16


@functools.cache
def _model(name):
    model = Transformer(dataclasses.replace(BASE, **ARCHITECTURES[name]))
    return model, jax.jit(init_params, static_argnums=0)(model, jax.random.key(1))


def _tokens(seed=0):
    return np.random.default_rng(seed).integers(0, BASE.vocab_size, (len(LENGTHS), LENGTHS.max() + NEW), dtype=np.int32)


def _uncached(model, params, tokens):
    return np.asarray(jax.jit(functools.partial(model.apply, method="forward"))({"params": params}, tokens))


@functools.cache
def _apply(name):
    model, params = _model(name)

    @jax.jit
    def apply(tokens, strategy, positions, cache):
        hidden, cache, _ = model.apply({"params": params}, tokens, strategy, positions, cache)
        return model.apply({"params": params}, hidden, method="logits"), cache

    return apply


def _poisoned(config, dtype=jnp.float32):
    """What is left in the pages from earlier use must not be seen."""
    return jax.tree.map(lambda x: x + jnp.nan, empty_cache(config, PAGES, PAGE_SIZE, dtype))


def _prefill(name, tokens, lengths, block_table, cache):
    """Prompts one after the other, without padding; returns the logits of each prompt's end, and the cache."""
    flat = np.concatenate([row[:length] for row, length in zip(tokens, lengths, strict=True)])[None]
    positions = np.concatenate([np.arange(length) for length in lengths])[None]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    lengths = np.asarray(lengths, np.int32)
    logits, cache = _apply(name)(flat, PagedAttention(block_table, lengths, starts), positions, cache)
    return np.asarray(logits)[0, starts[1:] - 1], cache


def _cached(name, tokens, chunk=1, **options):
    """Logits of the ``NEW`` tokens after each prompt (teacher forced), and of each prompt's end."""
    apply = _apply(name)
    rows = np.arange(len(LENGTHS))[:, None]
    logits, cache = _prefill(name, tokens, LENGTHS, BLOCK_TABLE, _poisoned(_model(name)[0].config))
    out = [logits[:, None]]
    for start in range(0, NEW, chunk):
        positions = LENGTHS[:, None] + start + np.arange(chunk, dtype=np.int32)
        query_starts = None if chunk == 1 else np.arange(len(LENGTHS) + 1, dtype=np.int32) * chunk
        attention = PagedAttention(BLOCK_TABLE, positions[:, -1] + 1, query_starts, **options)
        logits, cache = apply(tokens[rows, positions], attention, positions, cache)
        out.append(np.asarray(logits))
    return np.concatenate(out, axis=1)


@pytest.mark.sweep("softcap_and_experts")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow) if n in ("window", "grouped", "learned_positions") else n
        for n in ARCHITECTURES
    ],
)
def test_cached_logits_equal_uncached(name):
    model, params = _model(name)
    tokens = _tokens()
    where = LENGTHS[:, None] - 1 + np.arange(NEW + 1)
    expected = _uncached(model, params, tokens)[np.arange(len(LENGTHS))[:, None], where]
    assert expected.std() > 0.3
    np.testing.assert_allclose(_cached(name, tokens), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["patterned_windows"])
def test_several_tokens_at_once_equal_one_by_one(name):
    np.testing.assert_allclose(_cached(name, _tokens(), chunk=3), _cached(name, _tokens()), atol=1e-5)


def test_invariant_mode_gives_the_same_logits():
    name = "patterned_windows"
    np.testing.assert_allclose(_cached(name, _tokens(), invariant=True), _cached(name, _tokens()), atol=1e-5)


@pytest.mark.parametrize(
    "name", [n if n == "patterned_windows" else pytest.param(n, marks=pytest.mark.slow) for n in ARCHITECTURES]
)
def test_sharing_a_prefix_gives_the_logits_of_the_whole_forward(name):
    """Five rows: two share 16 tokens, two more share 8 of these, one shares nothing; then a ragged step of the same."""
    model, params = _model(name)
    tokens = np.random.default_rng(3).integers(0, BASE.vocab_size, (5, 22), dtype=np.int32)
    tokens[:4, :8] = tokens[0, :8]
    tokens[:2, :16] = tokens[0, :16]
    order = np.array([3, 0, 4, 2, 1])  # those who share are not neighbours
    tokens = tokens[order]
    own = iter(np.random.default_rng(4).permutation(24).astype(np.int32))
    pages = {}
    block_table = np.full((5, 6), 999, np.int32)
    for row, column in np.ndindex(block_table.shape):
        prefix = tuple(tokens[row, : PAGE_SIZE * (column + 1)])
        block_table[row, column] = pages[prefix] if prefix in pages and column < 4 else next(own)
        pages[prefix] = block_table[row, column]
    assert len(pages) == 2 + 2 + 2 * 2 + 2 * 4 + 6
    cache = jax.tree.map(lambda x: x + jnp.nan, empty_cache(model.config, 24, PAGE_SIZE, jnp.float32))
    expected = _uncached(model, params, tokens)
    apply = _apply(name)
    lengths = np.array([18, 17, 19, 20, 18], np.int32)
    _, cache = _prefill(name, tokens, [20] * 5, block_table, cache)

    def check(lengths, query_starts=None):
        plan = make_plan(
            block_table, lengths, query_starts, page_size=PAGE_SIZE, crossover=Crossover.always(), max_levels=2
        )
        assert plan.levels == 2
        counts = np.ones(5, int) if query_starts is None else np.diff(query_starts)
        rows = np.repeat(np.arange(5), counts)
        positions = np.concatenate([np.arange(n - c, n) for n, c in zip(lengths, counts, strict=True)])
        shape = (5, 1) if query_starts is None else (1, -1)
        attention = PagedAttention(block_table, lengths, query_starts, plan)
        logits, _ = apply(tokens[rows, positions].reshape(shape), attention, positions.reshape(shape), cache)
        return np.asarray(logits).reshape(len(rows), -1), expected[rows, positions]

    np.testing.assert_allclose(*check(lengths), atol=1e-4)
    np.testing.assert_allclose(*check(lengths + 1, np.array([0, 1, 3, 3, 6, 7], np.int32)), atol=1e-4)


@pytest.mark.slow
def test_a_wrong_page_in_the_shared_run_moves_the_logits():
    """The test above can fail."""
    name = "grouped"
    model, params = _model(name)
    tokens = np.tile(np.random.default_rng(3).integers(0, BASE.vocab_size, (1, 14), dtype=np.int32), (2, 1))
    block_table = np.array([[0, 1, 2, 3], [0, 1, 2, 4]], np.int32)
    lengths = np.array([13, 13], np.int32)
    apply = _apply(name)
    cache = empty_cache(BASE, 5, PAGE_SIZE, jnp.float32)
    _, cache = _prefill(name, tokens, [13] * 2, block_table, cache)
    expected = _uncached(model, params, tokens)[:, 12:13]
    for table, wrong in ((block_table, False), (np.where(block_table == 1, 2, block_table), True)):
        plan = make_plan(table, lengths, page_size=PAGE_SIZE, crossover=Crossover.always())
        assert plan.levels == 1
        logits, _ = apply(tokens[:, 12:13], PagedAttention(table, lengths, plan=plan), lengths[:, None] - 1, cache)
        assert (np.abs(np.asarray(logits) - expected).max() > 1e-2) == wrong


def test_token_beyond_the_pages_is_not_stored():
    model, params = _model("grouped")
    cache = empty_cache(BASE, 2, 4, jnp.float32)
    positions = np.array([[4], [3]])
    attention = PagedAttention(np.array([[0], [1]], np.int32), np.array([0, 4], np.int32))
    _, cache, _ = model.apply({"params": params}, jnp.ones((2, 1), jnp.int32), attention, positions, cache)
    written = np.abs(np.asarray(cache.key)).sum(axis=(0, 3, 4))
    assert (written > 0).tolist() == [[False] * 4, [False, False, False, True]]


def test_cache_has_the_dtype_of_activations():
    model = Transformer(BASE, dtype=jnp.bfloat16)
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(1))
    cache = empty_cache(BASE, 1, 8, jnp.bfloat16)
    attention = PagedAttention(np.zeros((1, 1), np.int32), np.array([1], np.int32))
    hidden, cache, _ = model.apply({"params": params}, jnp.ones((1, 1), jnp.int32), attention, np.array([[0]]), cache)
    assert cache.key.dtype == cache.value.dtype == hidden.dtype == jnp.bfloat16
