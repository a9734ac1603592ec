"""The XLA core against the reference, and its ordered mode bit for bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import PagedCache, paged_attention, quantize, xla_rows, xla_tiles
from pallas_kernels.paged_attention.core import attend_in_order, attend_segments, finish
from pallas_kernels.paged_attention.segments import Segments, ordered_block
from pallas_kernels.paged_attention.xla import XlaConfig, heuristic

PAGE = 16
# Small enough that short sequences take several chunks, lanes and tiles.
SMALL = XlaConfig(lanes=3, chunk=32, tile=4, short=32)
WIDE = dataclasses.replace(SMALL, wide=True)


class Batch:
    """Sequences in shuffled pages of a cache; whatever belongs to nobody is NaN, and so is a table's unused rest."""

    def __init__(self, lengths, *, heads=4, kv_heads=2, head_dim=64, dtype="float32", counts=None, seed=0, page=PAGE):
        rng = np.random.default_rng(seed)
        self.lengths = np.asarray(lengths, np.int32)
        need = -(-self.lengths // page)
        width = max(1, int(need.max())) + 1
        pages = int(need.sum()) + 2
        order = rng.permutation(pages)
        table = np.full((len(lengths), width), 10**6, np.int32)
        used = np.zeros((pages, page), bool)
        for s, count in enumerate(need):
            mine, order = order[:count], order[count:]
            table[s, :count] = mine
            token = np.arange(self.lengths[s])
            used[mine[token // page], token % page] = True
        self.block_table = jnp.asarray(table)
        self.counts = np.minimum(self.lengths, 1) if counts is None else np.asarray(counts, np.int32)
        self.query_starts = None if counts is None else jnp.asarray(np.concatenate([[0], np.cumsum(counts)]), jnp.int32)
        rows = len(lengths) if counts is None else int(self.counts.sum()) + 1
        self.query = jnp.asarray(rng.normal(size=(rows, heads, head_dim)), jnp.float32)
        shape = (2, pages, page, kv_heads, head_dim)
        key, value = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
        self.used = jnp.asarray(used)
        if dtype in ("int8", "float8_e4m3fn"):
            (key, key_scale), (value, value_scale) = (quantize(x, dtype) for x in (key, value))
            poison = jnp.where(self.used[None, :, None], 0, jnp.nan)
            key_scale, value_scale = (jnp.swapaxes(x, 2, 3) + poison for x in (key_scale, value_scale))
            self.cache = PagedCache(key, value, key_scale, value_scale)
        else:
            key, value = (jnp.where(self.used[None, :, :, None, None], x, jnp.nan).astype(dtype) for x in (key, value))
            self.cache = PagedCache(key, value)
            self.query = self.query.astype(dtype)

    def clean(self):
        """The cache without its NaN, for the reference."""
        return jax.tree.map(lambda x: jnp.nan_to_num(x.astype(jnp.float32)).astype(x.dtype), self.cache)

    def attend(self, implementation, **options):
        cache = self.clean() if implementation == "reference" else self.cache
        table = jnp.where(self.block_table > 10**5, 0, self.block_table)
        table = table if implementation == "reference" else self.block_table
        return paged_attention(
            self.query, cache, 1, table, jnp.asarray(self.lengths), self.query_starts,
            return_lse=True, implementation=implementation, **options,
        )  # fmt: skip


def agree(found, expected, *, share=1e-5):
    (out, lse), (expected_out, expected_lse) = found, expected
    out, expected_out = (np.asarray(x, np.float32) for x in (out, expected_out))
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out, expected_out, atol=share * max(1e-3, np.abs(expected_out).std()), rtol=share)
    np.testing.assert_allclose(np.asarray(lse), np.asarray(expected_lse), atol=10 * share, rtol=share)


LENGTHS = [0, 1, PAGE - 1, PAGE, PAGE + 1, 31, 32, 33, 97]


@pytest.mark.sweep("heuristic-4-2", "heuristic-16-1", "small-4-4", "wide-4-2")
@pytest.mark.parametrize("heads,kv_heads", [(4, 4), (4, 2), (16, 1)])
@pytest.mark.parametrize("config", [None, SMALL, WIDE], ids=["heuristic", "small", "wide"])
def test_decode(heads, kv_heads, config):
    batch = Batch(LENGTHS, heads=heads, kv_heads=kv_heads)
    agree(batch.attend("xla", config=config), batch.attend("reference"))


@pytest.mark.sweep("decode-int8-1e-05", "decode-float8_e4m3fn-1e-05", "ragged-bfloat16-0.008", "ragged-int8-1e-05")
@pytest.mark.parametrize(
    "dtype,share", [("bfloat16", 8e-3), ("float16", 1e-3), ("int8", 1e-5), ("float8_e4m3fn", 1e-5)]
)
@pytest.mark.parametrize("counts", [None, [0, 1, 4, 3, 9, 1, 32, 5, 20]], ids=["decode", "ragged"])
def test_types(dtype, share, counts):
    batch = Batch(LENGTHS, dtype=dtype, counts=counts)
    config = WIDE if counts is None else SMALL
    agree(batch.attend("xla", config=config), batch.attend("reference"), share=share)


@pytest.mark.sweep("96-64")
@pytest.mark.parametrize("head_dim,page", [(64, 16), (96, 64), (128, 32), (256, 128)])
def test_shapes(head_dim, page):
    batch = Batch([1, page - 1, page + 1, 2 * page + 3], head_dim=head_dim, page=page, counts=[1, 5, 1, 7])
    agree(batch.attend("xla"), batch.attend("reference"))


@pytest.mark.sweep("1-decode-traced", "40-ragged-static", "40-ragged-traced")
@pytest.mark.parametrize("traced", [False, True], ids=["static", "traced"])
@pytest.mark.parametrize("counts", [None, [0, 1, 4, 3, 9, 1, 32, 5, 20]], ids=["decode", "ragged"])
@pytest.mark.parametrize("window", [1, 40])
def test_window_and_softcap(traced, counts, window):
    batch = Batch(LENGTHS, counts=counts)
    window = jnp.int32(window) if traced else window
    options = {"window": window, "softcap": 2.0, "scale": 0.3}
    config = WIDE if counts is None else SMALL
    agree(batch.attend("xla", config=config, **options), batch.attend("reference", **options))


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("counts", [None, [0, 1, 4, 3, 9, 1, 32, 5, 20]], ids=["decode", "ragged"])
def test_starts(counts, invariant):
    batch = Batch(LENGTHS, counts=counts)
    # The fourth and eighth see nothing at all, in a ragged batch some of their rows.
    options = {"starts": jnp.asarray([0, 0, 0, 16, 16, 16, 0, 32, 48], jnp.int32), "invariant": invariant}
    agree(batch.attend("xla", config=SMALL, **options), batch.attend("reference", **options))


@pytest.mark.sweep("small-counts1")
@pytest.mark.parametrize("counts", [[1] * 9, [0, 1, 15, 16, 17, 31, 32, 33, 97], [0, 1, 4, 3, 9, 1, 32, 5, 20]])
@pytest.mark.parametrize("config", [SMALL], ids=["small"])
def test_ragged(counts, config):
    counts = np.minimum(counts, LENGTHS)
    batch = Batch(LENGTHS, counts=counts)
    agree(batch.attend("xla", config=config), batch.attend("reference"))


@pytest.mark.sweep("2")
@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_skewed(lanes):
    batch = Batch([300, 3, 3, 0, 3], heads=2, kv_heads=1)
    agree(batch.attend("xla", config=XlaConfig(lanes, 32, 1, short=1)), batch.attend("reference"))


def test_nothing_to_do():
    batch = Batch([0, 0])
    out, lse = batch.attend("xla")
    assert not out.any()
    assert np.isneginf(lse).all()


def test_grows_in_a_loop_on_the_device():
    batch = Batch([70, 40])

    @jax.jit
    def lengths_of(lengths):
        def one(_, lengths):
            paged = paged_attention(
                batch.query, batch.clean(), 1, jnp.maximum(batch.block_table % 10**6, 0), lengths, implementation="xla"
            )
            return lengths - 1, paged

        return jax.lax.scan(lambda c, _: one(None, c), lengths, None, length=3)[1]

    outs = lengths_of(jnp.asarray([70, 40], jnp.int32))
    batch.lengths = np.asarray([68, 38], np.int32)
    expected, _ = batch.attend("reference")
    np.testing.assert_allclose(outs[2], expected, atol=1e-5)


def node_case(seed=0, rows=9, page=PAGE):
    """Two nodes that share a table row's beginning, and a lone row, in shuffled outputs."""
    batch = Batch([200] * 2, seed=seed, page=page)
    query = jnp.asarray(np.random.default_rng(seed).normal(size=(rows, 4, 64)), jnp.float32)
    position = jnp.asarray([150, 60, 199, 130, 20, 199, 180, 100, 129][:rows], jnp.int32)
    segments = Segments(*(jnp.asarray(x, jnp.int32) for x in (
        [0, 5, 8, 0], [5, 3, 1, 0], [0, 1, 0, 7], [0, 0, 128, 0], [128, 128, 200, 99], [1, 6, 0, 3]
    )))  # fmt: skip
    return batch, query, position, segments


@pytest.mark.parametrize("window", [None, 70])
def test_nodes(window):
    batch, query, position, segments = node_case()
    results = [
        attend_segments(
            query, position, batch.clean(), 1, batch.block_table % 10**6, segments, outputs=9, decode=False,
            window=window, scale=0.1, implementation=name, config=SMALL if name == "xla" else None,
        )
        for name in ("xla", "cpu", "reference")
    ]  # fmt: skip
    for found in results[:-1]:
        agree(found, results[-1])


def same_bits(a, b):
    np.testing.assert_array_equal(np.asarray(a).view(np.int32), np.asarray(b).view(np.int32))


ORDERED = pytest.mark.parametrize("implementation", ["xla", "cpu"])


@ORDERED
@pytest.mark.sweep("4-2-xla", "4-2-cpu")
@pytest.mark.parametrize("heads,kv_heads", [(4, 4), (4, 2), (8, 1)])
def test_ordered_rows_do_not_depend_on_company(heads, kv_heads, implementation):
    """A row as a decode, alone, among others, in a prefill chunk, and in pieces: the same bits."""
    rng = np.random.default_rng(3)
    batch = Batch([300, 257, 129, 5], heads=heads, kv_heads=kv_heads, head_dim=64)
    cache, table = batch.clean(), batch.block_table % 10**6
    prefill = jax.jit(
        lambda q, lengths, starts, table: paged_attention(
            q, cache, 1, table, lengths, starts, invariant=True, return_lse=True, implementation=implementation
        )
    )
    query = jnp.asarray(rng.normal(size=(300, heads, 64)), jnp.float32)
    # All rows of the first sequence in one prefill.
    whole = prefill(query, jnp.asarray([300], jnp.int32), jnp.asarray([0, 300], jnp.int32), table[:1])
    for _ in range(4):
        position = np.sort(rng.choice(300, size=3, replace=False))
        # As decodes in one batch: the same pages, different lengths.
        found = paged_attention(
            query[position], cache, 1, table[jnp.zeros(3, int)], jnp.asarray(position + 1, jnp.int32),
            invariant=True, return_lse=True, implementation=implementation,
        )  # fmt: skip
        for x, y in zip(found, whole, strict=True):
            same_bits(x, y[position])
        # As the last rows of prefill chunks of random lengths, in company.
        ends = position + 1
        counts = np.array([rng.integers(1, end + 1) for end in ends])
        rows = np.concatenate([np.arange(end - count, end) for end, count in zip(ends, counts, strict=True)])
        starts = jnp.asarray(np.concatenate([[0], np.cumsum(counts)]), jnp.int32)
        found = prefill(query[rows], jnp.asarray(ends, jnp.int32), starts, table[jnp.zeros(3, int)])
        for x, y in zip(found, whole, strict=True):
            same_bits(x, y[rows])


@ORDERED
@pytest.mark.parametrize("page", [PAGE, 48])
def test_ordered_in_pieces(page, implementation):
    """Cut at multiples of the block, prefix first in company and then each row alone: the same bits as at once."""
    batch, query, _, _ = node_case(page=page)
    position = jnp.asarray([150, 160, 199, 130, 141, 199, 180, 177, 129], jnp.int32)
    table, block = batch.block_table % 10**6, ordered_block(page)
    call = {"outputs": 9, "scale": 0.1, "implementation": implementation}
    operands = query, position, batch.clean(), 1, table
    each = np.arange(9)

    def segments(begin, end, first=each, count=None):
        count = np.ones(len(first)) if count is None else count
        full = [np.full(len(first), x) for x in (0, begin, end)]
        return Segments(*(jnp.asarray(x, jnp.int32) for x in (first, count, *full, first)))

    at_once = attend_in_order(*operands, segments(0, 200), decode=True, **call)
    prefix = attend_in_order(*operands, segments(0, block, np.array([0, 7]), [7, 2]), decode=False, **call)
    pieces = attend_in_order(*operands, segments(block, 200), prefix, decode=True, **call)
    jax.tree.map(same_bits, at_once, pieces)
    untouched = attend_in_order(*operands, segments(block, 200, np.array([4])), prefix, decode=True, **call)
    keep = np.delete(each, 4)
    jax.tree.map(lambda x, y: same_bits(np.asarray(x)[keep], np.asarray(y)[keep]), untouched, prefix)
    reference = attend_segments(
        *operands, segments(0, 200), outputs=9, scale=0.1, decode=True, implementation="reference"
    )
    agree(finish(at_once, implementation), reference)


@ORDERED
def test_a_masked_block_leaves_the_bits(implementation):
    batch, query, position, segments = node_case()
    call = {"outputs": 9, "scale": 0.1, "implementation": implementation, "decode": False}
    operands = query, position, batch.clean(), 1, batch.block_table % 10**6
    carry = attend_in_order(*operands, segments, **call)
    carry = dataclasses.replace(carry, total=jnp.where(carry.total > 0.1, -0.0, carry.total))
    unseen = dataclasses.replace(segments, kv_begin=segments.kv_begin * 0 + 128, kv_end=segments.kv_end * 0 + 200)
    again = attend_in_order(query, position * 0 + 100, *operands[2:], unseen, carry, **call)
    jax.tree.map(same_bits, carry, again)


def test_config():
    with pytest.raises(ValueError, match="lanes=0; it must be a whole number of at least 1"):
        XlaConfig(0, 32, 4)
    cache = PagedCache.zeros(1, 4, 16, 8, 128, "bfloat16")
    found = heuristic(jnp.zeros((64, 32, 128)), cache, jnp.zeros((64, 256), jnp.int32))
    assert found == XlaConfig(lanes=1, chunk=128, tile=64)
    narrow = PagedCache.zeros(1, 4, 16, 4, 64, "bfloat16")
    found = heuristic(jnp.zeros((64, 8, 64)), narrow, jnp.zeros((64, 256), jnp.int32))
    assert found == XlaConfig(lanes=4, chunk=128, tile=64, wide=True)


def test_the_cache_is_not_copied():
    """No array in the program is as large as a layer of the cache, but the cache itself."""
    for dtype in ("bfloat16", "float8_e4m3fn"):
        cache = PagedCache.zeros(2, 4096, 16, 2, 64, dtype)
        table = jnp.zeros((2, 8), jnp.int32)
        for starts in (None, jnp.asarray([0, 3, 6], jnp.int32)):
            program = jax.jit(
                lambda q, cache, table, lengths, starts: paged_attention(
                    q, cache, 1, table, lengths, starts, implementation="xla"
                )
            ).lower(jnp.zeros((2 if starts is None else 6, 4, 64)), cache, table, jnp.full(2, 100, jnp.int32), starts)
            memory = program.compile().memory_analysis()
            assert memory.temp_size_in_bytes < cache.key.size * cache.key.dtype.itemsize / 4


@pytest.mark.parametrize(
    "name", ["a page is swapped", "a mask is dropped", "a lane is ignored", "short rows are left in their order"]
)
def test_mutants(monkeypatch, name):
    """Each broken version is caught by the comparison that the other tests make."""
    batch = Batch(LENGTHS, counts=None if name == "a lane is ignored" else [0, 1, 4, 3, 9, 1, 32, 5, 20])
    if name == "a page is swapped":
        real = xla_rows.xla_chunks.locate
        swap = lambda table, *a, **k: real(table.at[:, :2].set(table[:, 1::-1]), *a, **k)  # noqa: E731
        monkeypatch.setattr(xla_rows.xla_chunks, "locate", swap)
    elif name == "a mask is dropped":
        monkeypatch.setattr(xla_tiles, "seen", lambda p, begin, end, window: (begin, jnp.broadcast_to(end, p.shape)))
    elif name == "a lane is ignored":
        monkeypatch.setattr(xla_rows, "merge_all", lambda out, lse: (out[0], lse[0]))
    else:
        monkeypatch.setattr(xla_rows.jnp, "argsort", lambda x, **_: jnp.arange(x.size))
    with pytest.raises(AssertionError):
        agree(batch.attend("xla", config=SMALL), batch.attend("reference"))
