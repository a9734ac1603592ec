"""Shared-prefix attention against plain paged attention: trees of any shape, ragged rows, every option."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import PagedCache, paged_attention, quantize
from pallas_kernels.paged_attention.segments import ordered_block
from pallas_kernels.shared_prefix_attention import Crossover, make_plan, shared_prefix_attention

PAGE, HEADS, KV_HEADS, HEAD_DIM = 4, 4, 2, 16
PAGES, WIDTH = 400, 100
IMPLEMENTATIONS = ("xla", "reference")


@functools.cache
def _batch(seed=0, depth=3):
    """Block tables of a random tree, its leaves shuffled, one empty slot; pages of nobody hold NaN."""
    rng = np.random.default_rng(seed)
    pages = iter(rng.permutation(PAGES).tolist())

    def leaves(prefix, depth):
        if depth == 0:
            return [prefix + [next(pages) for _ in range(rng.integers(1, 4))] for _ in range(rng.integers(1, 4))]
        below = []
        for _ in range(rng.integers(1, 3)):
            below += leaves(prefix + [next(pages) for _ in range(rng.integers(0, 24))], depth - 1)
        return below

    sequences = [*leaves([next(pages)], depth), []]
    table = np.full((len(sequences), WIDTH), PAGES + 7, np.int32)  # beyond a sequence's end: never read
    lengths = np.zeros(len(sequences), np.int32)
    for row, s in enumerate(rng.permutation(len(sequences))):
        table[row, : len(sequences[s])] = sequences[s]
        lengths[row] = max(0, len(sequences[s]) * PAGE - rng.integers(0, PAGE))
    return table, lengths


def _cache(table, lengths, dtype="float32", seed=1):
    rng = np.random.default_rng(seed)
    key, value = (rng.normal(size=(2, PAGES, PAGE, KV_HEADS, HEAD_DIM)).astype(np.float32) for _ in range(2))
    held = np.zeros((PAGES, PAGE), bool)
    for pages, length in zip(table, lengths, strict=True):
        for position in range(length):
            held[pages[position // PAGE], position % PAGE] = True
    if dtype in ("float32", "bfloat16"):
        return PagedCache(*(jnp.asarray(np.where(held[..., None, None], x, np.nan), dtype) for x in (key, value)))
    (key, key_scale), (value, value_scale) = (quantize(jnp.asarray(x), dtype) for x in (key, value))
    scales = (jnp.where(held[:, None], jnp.swapaxes(x, -1, -2), jnp.nan) for x in (key_scale, value_scale))
    return PagedCache(key, value, *scales)


def _query(rows, dtype="float32"):
    return jnp.asarray(2 * np.random.default_rng(5).normal(size=(rows, HEADS, HEAD_DIM)), dtype)


def _ragged(lengths, seed=2):
    counts = np.minimum(np.random.default_rng(seed).integers(0, 5, len(lengths)), lengths)
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


def _both(table, lengths, query_starts=None, *, implementation, dtype="float32", padding=0, plan=None, **options):
    rows = len(lengths) if query_starts is None else int(query_starts[-1]) + padding
    cache, query = _cache(table, lengths, dtype), _query(rows, "bfloat16" if dtype == "bfloat16" else "float32")
    if plan is None:
        plan = make_plan(table, lengths, query_starts, page_size=PAGE, rows=rows, crossover=Crossover.always())
    operands = (query, cache, 1, jnp.asarray(table), jnp.asarray(lengths))
    starts = None if query_starts is None else jnp.asarray(query_starts)
    options = {"return_lse": True, **options}
    alone = paged_attention(*operands, query_starts=starts, implementation="reference", **options)
    shared = jax.jit(functools.partial(shared_prefix_attention, implementation=implementation, **options))
    return [[np.asarray(x, np.float32) for x in pair] for pair in (alone, shared(*operands, plan, starts))]


def _assert_equal(alone, shared, tolerance=2e-5):
    for expected, actual in zip(alone, shared, strict=True):
        finite = np.isfinite(expected)
        np.testing.assert_array_equal(np.isfinite(actual), finite)
        np.testing.assert_allclose(actual[finite], expected[finite], atol=tolerance, rtol=tolerance)


@pytest.mark.sweep("3-xla", "3-reference")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("seed", range(4))
def test_tree_equals_flat(seed, implementation):
    table, lengths = _batch(seed)
    _assert_equal(*_both(table, lengths, implementation=implementation))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_deep_tree(implementation):
    table, lengths = _batch(11, depth=5)
    plan = make_plan(table, lengths, page_size=PAGE, crossover=Crossover.always(), max_levels=9)
    assert plan.levels >= 3
    _assert_equal(*_both(table, lengths, implementation=implementation, plan=plan))


@pytest.mark.sweep("{'window': 17}-xla", "{'softcap': 3.0, 'scale': 0.4}-xla")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", [{}, {"window": 17}, {"softcap": 3.0, "scale": 0.4}], ids=str)
def test_ragged_rows_and_padding(options, implementation):
    table, lengths = _batch(1)
    _assert_equal(*_both(table, lengths, _ragged(lengths), padding=3, implementation=implementation, **options))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_traced_window(implementation):
    table, lengths = _batch(2)
    _assert_equal(*_both(table, lengths, window=jnp.int32(30), implementation=implementation))


@pytest.mark.sweep("int8-2e-05")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("bfloat16", 2e-2), ("int8", 2e-5), ("float8_e4m3fn", 2e-5)], ids=lambda x: str(x)
)
def test_types_of_cache(dtype, tolerance):
    table, lengths = _batch(3)
    _assert_equal(*_both(table, lengths, dtype=dtype, implementation="xla"), tolerance)


def test_stays_right_while_sequences_grow():
    table, lengths = _batch(1)
    plan = make_plan(table, np.maximum(lengths - 2, 0), page_size=PAGE, crossover=Crossover.always())
    _assert_equal(*_both(table, lengths, plan=plan, implementation="xla"))


@pytest.mark.sweep("True")
@pytest.mark.parametrize("ragged", [False, True])
def test_invariant_is_bitwise_the_unshared_result(ragged, implementation="xla"):
    table, lengths = _long_batch()
    starts = _ragged(lengths) if ragged else None
    rows = len(lengths) if starts is None else int(starts[-1])
    granularity = ordered_block(PAGE)
    plan = make_plan(table, lengths, starts, page_size=PAGE, crossover=Crossover.always(), granularity=granularity)
    assert plan.levels == 2
    operands = (_query(rows), _cache(table, lengths), 1, jnp.asarray(table), jnp.asarray(lengths))
    options = {"query_starts": starts, "implementation": implementation, "invariant": True, "return_lse": True}
    alone = jax.jit(functools.partial(paged_attention, **options))(*operands)
    shared = jax.jit(functools.partial(shared_prefix_attention, **options))(*operands, plan=plan)
    for expected, actual in zip(alone, shared, strict=True):
        np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected))
    # Beside the exact result, it is another rounding.
    _assert_equal(*_both(table, lengths, starts, plan=plan, implementation=implementation))


def _long_batch():
    """Four sequences share 128 tokens, two of them 128 more."""
    fresh = itertools.count()
    common = [next(fresh) for _ in range(32)]
    pair = common + [next(fresh) for _ in range(32)]
    table = np.full((5, WIDTH), PAGES, np.int32)
    for row, prefix in enumerate([pair, common, [], common, pair]):
        pages = prefix + [next(fresh) for _ in range(3 + row)]
        table[row, : len(pages)] = pages
    return table, np.array([265, 140, 18, 150, 281], np.int32)


def test_a_swapped_page_or_a_forgotten_level_is_noticed():
    table, lengths = _batch(0)
    plan = make_plan(table, lengths, page_size=PAGE, crossover=Crossover.always())
    segment = int(np.argmax(plan.nodes.kv_end - plan.nodes.kv_begin))
    forgotten = dataclasses.replace(plan, covered=np.where(np.arange(plan.levels)[:, None] == 0, False, plan.covered))
    kv_end = plan.nodes.kv_end.copy()
    kv_end[segment] -= 1
    shortened = dataclasses.replace(plan, nodes=dataclasses.replace(plan.nodes, kv_end=kv_end))
    for wrong in (forgotten, shortened):
        alone, shared = _both(table, lengths, plan=wrong, implementation="xla")
        with pytest.raises(AssertionError):
            _assert_equal(alone, shared, tolerance=1e-3)


def test_gradients_and_vmap_of_layers():
    table, lengths = _batch(2)
    plan = make_plan(table, lengths, page_size=PAGE, crossover=Crossover.always())
    cache = jax.tree.map(jnp.nan_to_num, _cache(table, lengths))
    query = _query(len(lengths))

    def of_layer(layer, attend, **more):
        return attend(query, cache, layer, jnp.asarray(table), jnp.asarray(lengths), implementation="reference", **more)

    alone = jax.lax.map(lambda layer: of_layer(layer, paged_attention), jnp.arange(2))
    shared = jax.vmap(lambda layer: of_layer(layer, shared_prefix_attention, plan=plan))(jnp.arange(2))
    np.testing.assert_allclose(shared, alone, atol=2e-5)


def test_refuses_a_plan_of_another_batch_or_grain():
    table, lengths = _batch(0)
    cache, query = _cache(table, lengths), _query(len(lengths))
    tables = (jnp.asarray(table), jnp.asarray(lengths))
    plan = make_plan(table, lengths, page_size=PAGE, crossover=Crossover.always())
    with pytest.raises(ValueError, match="plan is for"):
        shared_prefix_attention(query[1:], cache, 0, tables[0][1:], tables[1][1:], plan)
    with pytest.raises(ValueError, match="granularity a multiple of 128"):
        shared_prefix_attention(query, cache, 0, *tables, plan, invariant=True)
    with pytest.raises(ValueError, match="granularity=6"):
        make_plan(table, lengths, page_size=PAGE, crossover=Crossover.always(), granularity=6)
    with pytest.raises(ValueError, match="query_starts"):
        make_plan(table, lengths, np.arange(3), page_size=PAGE, crossover=Crossover.always())
    with pytest.raises(ValueError, match="block_table"):
        make_plan(table[:2], lengths, page_size=PAGE, crossover=Crossover.always())
