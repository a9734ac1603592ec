"""The kernel for CPUs against the reference."""

import concurrent.futures

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_xla import LENGTHS, PAGE, Batch, agree, same_bits

from pallas_kernels.paged_attention import PagedCache, cpu, paged_attention
from pallas_kernels.paged_attention.core import attend_in_order, resolve
from pallas_kernels.paged_attention.segments import Carry, Segments

RAGGED = [0, 1, 4, 1, 9, 1, 32, 5, 1]


HEADS = pytest.mark.parametrize("heads,kv_heads", [(4, 4), (4, 2), (6, 2), (7, 1), (16, 1)])
# Each alone, or chunks of several rows among single ones.
COUNTS = pytest.mark.parametrize("counts", [None, RAGGED], ids=["decode", "ragged"])


@HEADS
@COUNTS
def test_heads(heads, kv_heads, counts):
    batch = Batch(LENGTHS, heads=heads, kv_heads=kv_heads, counts=counts)
    agree(batch.attend("cpu"), batch.attend("reference"))


@pytest.mark.parametrize("head_dim,page", [(16, 16), (96, 64), (128, 32), (256, 128)])
def test_shapes(head_dim, page):
    batch = Batch([1, page - 1, page + 1, 2 * page + 3], head_dim=head_dim, page=page, counts=[1, 5, 1, page + 7])
    agree(batch.attend("cpu"), batch.attend("reference"))


@pytest.mark.parametrize("dtype,share", [("bfloat16", 8e-3), ("int8", 1e-5), ("float8_e4m3fn", 1e-5)])
@COUNTS
def test_types(dtype, share, counts):
    batch = Batch(LENGTHS, dtype=dtype, counts=counts)
    agree(batch.attend("cpu"), batch.attend("reference"), share=share)


def test_float8_to_the_last_number():
    """Every number of the type, the subnormal ones too, as the only value that is seen."""
    numbers = np.array([x for x in range(256) if x & 0x7F != 0x7F], np.uint8).view(jnp.float8_e4m3fn)
    values = np.zeros((1, 16, 16, 1, 16), jnp.float8_e4m3fn)
    values[0, :, 0, 0] = np.resize(numbers, (16, 16))
    ones = jnp.ones((1, 16, 1, 16))
    cache = PagedCache(jnp.zeros_like(values), jnp.asarray(values), ones, ones)
    table, lengths = jnp.arange(16, dtype=jnp.int32)[:, None], jnp.ones(16, jnp.int32)
    out = paged_attention(jnp.ones((16, 1, 16)), cache, 0, table, lengths, implementation="cpu")
    np.testing.assert_array_equal(out[:, 0], values[0, :, 0, 0].astype(np.float32))


@pytest.mark.parametrize("traced", [False, True], ids=["static", "traced"])
@pytest.mark.parametrize("window", [1, 40])
@COUNTS
def test_window_and_softcap(traced, window, counts):
    batch = Batch(LENGTHS, counts=counts)
    options = {"window": jnp.int32(window) if traced else window, "softcap": 2.0, "scale": 0.3}
    agree(batch.attend("cpu", **options), batch.attend("reference", **options))


@COUNTS
def test_starts(counts):
    """Some rows see nothing."""
    batch = Batch(LENGTHS, counts=counts)
    options = {"starts": jnp.asarray([0, 0, 0, 16, 16, 16, 0, 32, 48], jnp.int32)}
    agree(batch.attend("cpu", **options), batch.attend("reference", **options))


def test_long_rows_are_cut_and_joined():
    batch = Batch([1500, 3, 0, 700], heads=4, kv_heads=2)
    agree(batch.attend("cpu"), batch.attend("reference"))


def test_many_rows_are_cut_into_tiles():
    batch = Batch([333, 140, 20], heads=6, kv_heads=2, counts=[333, 97, 2])
    agree(batch.attend("cpu"), batch.attend("reference"))


@pytest.mark.parametrize("counts", [None, [200, 1]], ids=["decode", "ragged"])
def test_logits_of_any_size(counts):
    """Peaks that rise and fall by hundreds from block to block: no overflow, no row without weight."""
    batch = Batch([1000, 64], heads=2, kv_heads=1, counts=counts)
    options = {"scale": 30.0}
    agree(batch.attend("cpu", **options), batch.attend("reference", **options), share=1e-3)


def test_nothing_to_do():
    out, lse = Batch([0, 0]).attend("cpu")
    assert not out.any()
    assert np.isneginf(lse).all()


def test_scan_vmap_and_remat_around_it():
    batch = Batch([70, 40])
    operands = batch.clean(), 1, batch.block_table % 10**6

    def attend(query, lengths, implementation="cpu"):
        return paged_attention(query, *operands, lengths, implementation=implementation)

    lengths = jnp.asarray([[70, 40], [69, 39], [5, 0]], jnp.int32)
    expected = jnp.stack([attend(batch.query, x, "reference") for x in lengths])
    scanned = jax.lax.scan(lambda _, x: (None, jax.checkpoint(attend)(batch.query, x)), None, lengths)[1]
    mapped = jax.jit(jax.vmap(attend, (None, 0)))(batch.query, lengths)
    for found in (scanned, mapped):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_calls_at_once():
    """More calls than threads of the pool, each of which wants help from it."""
    batch = Batch([300] * 8)
    operands = batch.cache, 1, batch.block_table, batch.lengths
    program = jax.jit(lambda query: paged_attention(query, *operands, implementation="cpu"))
    expected = np.asarray(program(batch.query))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: np.asarray(program(batch.query)), range(64)):
            np.testing.assert_array_equal(found, expected)


def test_the_cache_is_not_copied():
    cache = PagedCache.zeros(2, 4096, 16, 2, 64, "float32")
    operands = jnp.zeros((2, 4, 64)), cache, 1, jnp.zeros((2, 8), jnp.int32), jnp.full(2, 100, jnp.int32)
    program = jax.jit(lambda *x: paged_attention(*x, implementation="cpu")).lower(*operands).compile()
    assert program.memory_analysis().temp_size_in_bytes < 2**16


def test_what_it_does_not_support():
    cache = PagedCache.zeros(1, 2, 16, 1, 24, "float32")
    with pytest.raises(ValueError, match="implementation='cpu' does not support this case: head_dim 24 is not a mul"):
        resolve(jnp.zeros((2, 1, 24)), cache, True, "cpu")
    with pytest.raises(ValueError, match="a cache of float16; it reads float32, bfloat16, int8, float8_e4m3fn"):
        resolve(jnp.zeros((2, 1, 16)), PagedCache.zeros(1, 2, 16, 1, 16, "float16"), True, "cpu")
    assert resolve(jnp.zeros((2, 1, 24)), cache, True, "auto") == "xla"


MUTANTS = {
    "the weights so far are not brought to the new peak": ("state.weight[vector] * decay", "state.weight[vector]"),
    "the last token of a part is left out": ("low + most, high), states", "low + most, high - 1), states"),
    "a page is another's": ("++at, offset = 0", "offset = 0"),
    "parts are joined as if their peaks were equal": (
        "std::exp(parts[p].peak[vector] - peak) / weight", "1.0f / weight"
    ),
    "a tile's rows see what its first sees": ("tile.high[v] - begin", "tile.high[0] - begin"),
    "only a tile's first values are added": (
        "v < vectors; v += kRows) {\n      TileAcc", "v < 1; ++v) {\nTileAcc"
    ),
}  # fmt: skip


@pytest.mark.sweep("a page is another's")
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants(mutate, name):
    mutate(cpu, "paged_attention", *MUTANTS[name])
    lengths = [1500, 3, PAGE + 1, 700, 90]
    for batch in Batch(lengths), Batch(lengths, counts=[1, 1, 1, 1, 50]):
        found, expected = batch.attend("cpu"), batch.attend("reference")
        if "tile" not in name or batch.query_starts is not None:
            with pytest.raises(AssertionError):
                agree(found, expected)


def test_ordered_rows_in_a_window_do_not_depend_on_company():
    """A tile begins at the first token that any of its rows sees; its blocks do not."""
    batch = Batch([300], heads=4, kv_heads=2)
    operands = batch.clean(), 1, batch.block_table % 10**6
    options = {"window": 70, "invariant": True, "return_lse": True, "implementation": "cpu"}
    query = jnp.asarray(np.random.default_rng(1).normal(size=(300, 4, 64)), jnp.float32)
    together = paged_attention(query, *operands, batch.lengths, jnp.asarray([0, 300], jnp.int32), **options)
    for position in (3, 69, 70, 129, 171, 299):
        alone = paged_attention(query[position][None], *operands, jnp.asarray([position + 1], jnp.int32), **options)
        for x, y in zip(alone, together, strict=True):
            same_bits(x[0], y[position])


def test_a_row_that_sees_nothing_keeps_its_bits_in_company():
    batch = Batch([300], heads=4, kv_heads=2)
    query = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 64)), jnp.float32)
    before = Carry(jnp.full((2, 4, 64), -0.0), jnp.ones((2, 4)), jnp.zeros((2, 4)))
    segments = Segments(*(jnp.asarray([x], jnp.int32) for x in (0, 2, 0, 128, 300, 0)))
    after = attend_in_order(
        query, jnp.asarray([100, 299], jnp.int32), batch.clean(), 1, batch.block_table % 10**6, segments, before,
        outputs=2, decode=False, scale=0.1, implementation="cpu",
    )  # fmt: skip
    for x, y in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        same_bits(x[0], y[0])
        assert (x[1] != y[1]).any()
