"""The TPU kernel, interpreted, against the reference: types, groups, pages, masks, mixes of rows, the fixed order."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import PagedCache, paged_attention, quantize, tpu
from pallas_kernels.paged_attention.core import attend_in_order, attend_segments, finish
from pallas_kernels.paged_attention.segments import (
    Carry,
    Segments,
    decode_segments,
    ragged_positions,
    ragged_segments,
)
from pallas_kernels.paged_attention.tpu_tiles import make_tiles

CONFIG = tpu.TpuConfig(block=256, compute=128, rows=8, ordered_rows=4)
NOWHERE = 10**6


@dataclasses.dataclass(frozen=True)
class Batch:
    """Sequences of random tokens in shuffled pages; whatever holds no token is NaN, entries beyond the end nowhere."""

    cache: PagedCache
    table: np.ndarray
    lengths: np.ndarray

    @property
    def segments(self) -> Segments:
        return decode_segments(jnp.asarray(self.lengths))

    @property
    def clean(self) -> "Batch":
        """For the reference, which multiplies all it can reach."""
        cache = jax.tree.map(jnp.nan_to_num, self.cache)
        return Batch(cache, np.where(self.table == NOWHERE, 0, self.table), self.lengths)


def batch_of(lengths, *, kv_heads=2, head_dim=32, page_size=16, dtype="float32", width=None, seed=0) -> Batch:
    rng = np.random.default_rng(seed)
    width = -(-max(lengths) // page_size) if width is None else width
    pages = len(lengths) * width + 2
    table = rng.permutation(pages)[: len(lengths) * width].reshape(len(lengths), width)
    held = np.zeros((pages, page_size), bool)
    for row, length in zip(table, lengths, strict=True):
        for token in range(length):
            held[row[token // page_size], token % page_size] = True
    shape = (2, pages, page_size, kv_heads, head_dim)
    keys, values = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    table = np.where(np.arange(width) * page_size < np.asarray(lengths)[:, None], table, NOWHERE)
    if dtype in ("float32", "bfloat16"):
        cache = PagedCache(*(jnp.where(held[..., None, None], x, jnp.nan).astype(dtype) for x in (keys, values)))
    else:
        (keys, key_scale), (values, value_scale) = (quantize(x, dtype) for x in (keys, values))
        scales = (jnp.where(held[:, None], jnp.swapaxes(x, 2, 3), jnp.nan) for x in (key_scale, value_scale))
        cache = PagedCache(keys, values, *scales)
    return Batch(cache, table.astype(np.int32), np.asarray(lengths, np.int32))


def query_of(rows, heads, head_dim, dtype="float32"):
    return jnp.asarray(1.5 * np.random.default_rng(7).normal(size=(rows, heads, head_dim)), dtype)


@functools.partial(jax.jit, static_argnames=("outputs", "decode", "softcap", "config", "ordered", "implementation"))
def run(query, position, cache, table, segments, window, carry, *, implementation="tpu", ordered=False, **options):
    options = {"window": window, "scale": query.shape[-1] ** -0.5, "implementation": implementation, **options}
    if ordered:
        return attend_in_order(query, position, cache, 1, table, segments, carry, **options)
    return attend_segments(query, position, cache, 1, table, segments, **options)


def check(query, position, batch, segments, *, written=None, window=None, softcap=None, decode=False, config=CONFIG):
    """Holds the kernel against the reference in the rows that segments write; returns the kernel's result."""
    outputs = query.shape[0] if written is None else written.size
    written = np.ones(outputs, bool) if written is None else written
    position = jnp.asarray(position)
    options = {"outputs": outputs, "decode": decode, "softcap": softcap}
    got = run(query, position, batch.cache, batch.table, segments, window, None, config=config, **options)
    clean = batch.clean
    operands = (query.astype(jnp.float32), position, clean.cache, clean.table, segments, window, None)
    with jax.default_matmul_precision("highest"):
        wanted = run(*operands, implementation="reference", config=None, **options)
    exact = query.dtype == jnp.float32
    for x, y in zip(got, wanted, strict=True):
        x, y = np.asarray(x)[written], np.asarray(y)[written]
        np.testing.assert_array_equal(np.isneginf(x), np.isneginf(y))
        tolerance = 1e-5 if exact else 1e-2
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)
    return got


def slow(*values):  # in the interpreter; one of each kind is quick enough
    return pytest.param(*values, marks=pytest.mark.slow)


EDGES = (0, 1, 15, 16, 17, 127, 128, 129, 255, 256, 257)


@pytest.mark.sweep("4-2-32-16-float32-float32", "2-1-256-32-int8-bfloat16")
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page_size", "dtype", "query_dtype"),
    [
        (4, 2, 32, 16, "float32", "float32"),
        slow(4, 4, 64, 16, "bfloat16", "bfloat16"),
        slow(6, 2, 128, 64, "bfloat16", "float32"),
        (16, 1, 64, 128, "bfloat16", "bfloat16"),
        slow(4, 4, 32, 16, "int8", "float32"),
        (8, 4, 192, 32, "float8_e4m3fn", "float32"),
        (2, 1, 256, 32, "int8", "bfloat16"),
    ],
)
def test_decoding(heads, kv_heads, head_dim, page_size, dtype, query_dtype):
    sizes = {"kv_heads": kv_heads, "head_dim": head_dim, "page_size": page_size}
    batch = batch_of(EDGES, dtype=dtype, **sizes)
    query = query_of(len(EDGES), heads, head_dim, query_dtype)
    check(query, batch.lengths - 1, batch, batch.segments, decode=True)


def test_a_swapped_page_and_a_wrong_length_are_noticed():
    batch = batch_of(EDGES)
    query = query_of(len(EDGES), 4, 32)
    out, _ = check(query, batch.lengths - 1, batch, batch.segments, decode=True)
    swapped = batch.table.copy()
    swapped[-1, [0, 16]] = swapped[-1, [16, 0]]  # the last page holds one token
    options = {"outputs": len(EDGES), "decode": True, "softcap": None, "config": CONFIG}
    other, _ = run(query, batch.lengths - 1, batch.cache, swapped, batch.segments, None, None, **options)
    assert np.abs(other[-1] - out[-1]).max() > 0.05 or not np.isfinite(other[-1]).all()
    np.testing.assert_array_equal(other[:-1], out[:-1])
    shorter = decode_segments(jnp.asarray(batch.lengths - 1))
    other, _ = run(query, batch.lengths - 1, batch.cache, batch.table, shorter, None, None, **options)
    assert np.abs(other - out).max(axis=(1, 2))[2:].min() > 1e-3


def ragged(lengths, counts, rows):
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    position = ragged_positions(jnp.asarray(lengths, jnp.int32), jnp.asarray(starts), rows)
    return starts, position


LENGTHS, COUNTS, ROWS = (300, 1, 40, 0, 257, 70), (1, 1, 40, 0, 9, 2), 56


@pytest.mark.sweep("4-2-float32-None")
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dtype", "softcap"),
    [(4, 2, "float32", None), slow(4, 4, "bfloat16", 3.0), slow(3, 1, "float32", None), (8, 4, "int8", None)],
)
def test_ragged_rows(heads, kv_heads, dtype, softcap):
    batch = batch_of(LENGTHS, kv_heads=kv_heads, dtype=dtype)
    starts, position = ragged(LENGTHS, COUNTS, ROWS)
    segments = ragged_segments(jnp.asarray(batch.lengths), jnp.asarray(starts))
    written = np.arange(ROWS) < starts[-1]
    query = query_of(ROWS, heads, 32)
    for window in (10**6, 100, 1):
        check(query, position, batch, segments, written=written, window=jnp.int32(window), softcap=softcap)
    begin = jnp.asarray([128, 0, 16, 0, 64, 32])
    from_a_page_on = ragged_segments(jnp.asarray(batch.lengths), jnp.asarray(starts), begin)
    check(query, position, batch, from_a_page_on, written=written, window=jnp.int32(10**6), softcap=softcap)


@pytest.mark.parametrize("cores", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_rows_below_the_nodes_of_a_tree(cores):
    """Rows of several sequences against one run of tokens, whose results lie elsewhere than their queries."""
    lengths = (384, 384, 384, 384)
    batch = batch_of(lengths)
    rows, outputs = 20, 48
    segments = Segments(
        *(
            jnp.asarray(x, jnp.int32)
            for x in (
                [0, 3, 14, 5],
                [20, 11, 1, 0],
                [2, 0, 1, 3],
                [0, 256, 128, 0],
                [256, 300, 128, 64],
                [25, 4, 0, 47],
            )
        )
    )
    written = np.zeros(outputs, bool)
    for begin, count in ((25, 20), (4, 11), (0, 1)):
        written[begin : begin + count] = True
    position = np.full(rows, 383, np.int32)
    position[7] = -1  # sees nothing
    config = dataclasses.replace(CONFIG, cores=cores)
    out, lse = check(query_of(rows, 4, 32), position, batch, segments, written=written, config=config)
    for row in (25 + 7, 4 + 4, 0):
        assert np.isneginf(lse[row]).all()
        assert not out[row].any()


def _ordered(query, position, batch, segments, outputs, decode, carry=None):
    options = {"outputs": outputs, "decode": decode, "softcap": None, "config": CONFIG, "ordered": True}
    carry = Carry.nothing(outputs, *query.shape[1:]) if carry is None else carry
    return run(query, jnp.asarray(position), batch.cache, batch.table, segments, None, carry, **options)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_order_does_not_depend_on_company_or_cuts(dtype):
    batch = batch_of(LENGTHS, dtype=dtype, width=24)
    starts, position = ragged(LENGTHS, COUNTS, ROWS)
    lengths = jnp.asarray(batch.lengths)
    segments = ragged_segments(lengths, jnp.asarray(starts))
    query = query_of(ROWS, 4, 32, dtype)
    whole = _ordered(query, position, batch, segments, ROWS, False)
    out, _ = finish(whole, "tpu")
    clean = batch.clean
    options = {"outputs": ROWS, "decode": False, "softcap": None, "config": None, "implementation": "reference"}
    wanted, _ = run(query, position, clean.cache, clean.table, segments, None, None, **options)
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    used = int(starts[-1])
    np.testing.assert_allclose(out[:used], wanted[:used], rtol=tolerance, atol=tolerance)
    # Each row alone, as a decode of its own; rows of one segment are rows of many in the first call.
    rows = [0, 1, 5, 41, 47, 51, 52]
    of = np.searchsorted(starts, rows, side="right") - 1
    alone = Segments(
        *(
            jnp.asarray(x, jnp.int32)
            for x in (np.arange(7), np.ones(7), of, np.zeros(7), batch.lengths[of], np.arange(7)[::-1])
        )
    )
    one = _ordered(query[np.asarray(rows)], position[np.asarray(rows)], batch, alone, 7, True)
    for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(one), strict=True):
        np.testing.assert_array_equal(np.asarray(x)[rows], np.asarray(y)[::-1])
    # The tokens in pieces, cut where they may be.
    carry = None
    for begin, end in ((0, 128), (128, 256), (256, 384)):
        piece = dataclasses.replace(
            segments, kv_begin=jnp.full_like(lengths, begin), kv_end=jnp.minimum(lengths, end).astype(jnp.int32)
        )
        carry = _ordered(query, position, batch, piece, ROWS, False, carry)
    for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(carry), strict=True):
        np.testing.assert_array_equal(x, y)
    assert np.isneginf(whole.peak[starts[-1] :]).all()  # rows of no segment keep what they had


def test_through_the_front():
    """The public function, in a loop on the device that lengthens the sequences."""
    batch = batch_of((40, 17, 130), width=12)
    query = query_of(3, 4, 32)

    def steps(implementation, cache, table):
        def step(carry, _):
            query, lengths = carry
            options = {"implementation": implementation, "config": CONFIG if implementation == "tpu" else None}
            out, lse = paged_attention(query, cache, 1, table, lengths, return_lse=True, window=50, **options)
            return (query + out, lengths - 3), lse

        return jax.lax.scan(step, (query, jnp.asarray(batch.lengths)), None, length=3)

    (got, _), lse = jax.jit(functools.partial(steps, "tpu"))(batch.cache, batch.table)
    (wanted, _), wanted_lse = jax.jit(functools.partial(steps, "reference"))(batch.clean.cache, batch.clean.table)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lse, wanted_lse, rtol=1e-5, atol=1e-5)


def test_cores_share_blocks_of_skewed_lengths():
    lengths = jnp.asarray([100 * 256, *[256] * 100], jnp.int32)
    options = {"rows": 8, "capacity": 101, "page_size": 16, "block": 256, "ordered": False, "cores": 2}
    segments = decode_segments(lengths)
    work = make_tiles(segments, segments.query_count, lengths - 1, None, **options)
    np.testing.assert_array_equal(work.bounds, [0, 1, 101])


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"block": 100}, "block=100"),
        ({"compute": 0}, "compute=0"),
        ({"rows": 12}, "rows=12"),
        ({"block": 384, "compute": 256}, "compute=256"),
        ({"rows": 4, "ordered_rows": 8}, "ordered_rows=8"),
        ({"cores": 0}, "cores=0"),
    ],
)
def test_impossible_sizes_are_refused(sizes, named):
    with pytest.raises(ValueError, match=named):
        tpu.TpuConfig(**sizes)


def test_unsupported_cases_are_named():
    def why(query="bfloat16", cache="bfloat16", page_size=16, kv_heads=8, head_dim=128):
        shape = jax.ShapeDtypeStruct((2, 9, page_size, kv_heads, head_dim), cache)
        return tpu.why_not(jax.ShapeDtypeStruct((4, 16, head_dim), query), PagedCache(shape, shape), decode=True)

    assert why() is None
    assert "float16" in why(query="float16")
    assert "page_size 24" in why(page_size=24)
    assert "page_size 16" in why(kv_heads=1, cache="int8")
    assert "head_dim 512" in why(head_dim=512)
    with pytest.raises(ValueError, match="page_size 12"):
        batch = batch_of((5,), page_size=12)
        paged_attention(query_of(1, 4, 32), batch.cache, 0, batch.table, batch.lengths, implementation="tpu")


def test_heuristic_fills_blocks_and_tiles():
    shape = jax.ShapeDtypeStruct((2, 9, 64, 8, 128), jnp.bfloat16)
    config = tpu.heuristic(jax.ShapeDtypeStruct((4, 32, 128), jnp.bfloat16), PagedCache(shape, shape), "TPU v5")
    assert config == tpu.TpuConfig(block=512, compute=512, rows=128, ordered_rows=8, cores=2)
