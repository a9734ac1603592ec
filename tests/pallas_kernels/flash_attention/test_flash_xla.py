"""XLA's blocks over intervals, unrolled and in loops: against float64, and gradients against those of the formula.

What holds for the kernel for CPUs alike is tested of both; `test_flash_cpu` has the rest.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.flash_attention import backend, flash_attention, vjp, xla
from pallas_kernels.flash_attention.intervals import self_intervals
from pallas_kernels.flash_attention.xla import XlaConfig
from pallas_kernels.log_sum_exp import merge

# None of these divides the lengths.
UNROLLED, LOOPS = XlaConfig(block=8, max_blocks=100), XlaConfig(max_blocks=0, tile_q=8, tile_kv=10)
CONFIGS = pytest.mark.parametrize("config", [UNROLLED, LOOPS], ids=["unrolled", "loops"])
# A way to compute, and a shape that it takes.
WAYS = pytest.mark.parametrize(
    "name,options",
    [
        ("fewer_queries", {"implementation": "xla", "config": UNROLLED}),
        ("fewer_queries", {"implementation": "xla", "config": LOOPS}),
        ("tiles", {"implementation": "cpu"}),
    ],
    ids=["unrolled", "loops", "cpu"],
)
# (queries, keys, heads, kv_heads, head_dim, softcap)
SHAPES = {
    "fewer_queries": (21, 45, 6, 2, 8, None),
    "fewer_keys": (45, 21, 4, 4, 16, None),
    "softcap": (24, 20, 4, 1, 8, 1.5),
    "one_query": (1, 33, 2, 1, 8, None),
    "one_key": (33, 1, 2, 2, 96, None),
    "wide": (17, 19, 2, 1, 256, None),
}
# Several of the tiles that the kernel for CPUs cuts queries and keys into, and parts of them.
TILES = {
    "tiles": (150, 200, 6, 2, 32, None),
    "tiles_softcap": (131, 70, 7, 1, 16, 1.5),
    "one_tile": (9, 64, 4, 4, 48, None),
}


@functools.cache
def inputs(name):
    queries, keys, heads, kv_heads, width, _ = (SHAPES | TILES)[name]
    rng = np.random.default_rng(0)
    sizes = ((queries, heads), (keys, kv_heads), (keys, kv_heads), (queries, heads))
    q, k, v, w = (rng.normal(size=(2, *size, width)).astype(np.float32) for size in sizes)
    intervals = np.sort(rng.integers(-3, keys + 4, (2, queries, 2)), axis=-1).astype(np.int32)
    intervals[:, queries // 2] = [[5, 5], [9, 2]]  # see nothing
    intervals[:, -1] = [0, keys]
    return (2 * q, k, v), (w, rng.normal(size=w.shape[:3]).astype(np.float32)), intervals


def oracle(q, k, v, intervals, softcap):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    logits = np.einsum("bqhd,bkhd->bqhk", q, k) / np.sqrt(q.shape[-1])
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    column = np.arange(k.shape[1])
    seen = (intervals[..., :1] <= column) & (column < intervals[..., 1:])
    weights = np.where(seen[:, :, None], np.exp(logits), 0.0)
    total = weights.sum(-1)
    out = np.einsum("bqhk,bkhd->bqhd", weights / np.where(total == 0, 1, total)[..., None], v)
    with np.errstate(divide="ignore"):
        return out, np.log(total)


def gradients(name, intervals=None, **options):
    """Of a sum over outputs and log-sum-exps with random weights; and these two."""
    tensors, (w, w_lse), drawn = inputs(name)
    intervals = drawn if intervals is None else intervals

    def loss(q, k, v):
        call = functools.partial(
            flash_attention, intervals=intervals, softcap=(SHAPES | TILES)[name][5], return_lse=True
        )
        out, lse = call(q, k, v, **options)
        return (w * out).sum() + jnp.where(jnp.isneginf(lse), 0.0, w_lse * lse).sum(), (out, lse)

    return jax.device_get(jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*tensors))


def distance(got, expected):
    return max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(got, expected, strict=True))


@pytest.mark.sweep(
    "unrolled-fewer_keys", "unrolled-softcap", "loops-fewer_queries", "loops-wide", "traced-softcap", "traced-one_query"
)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", ["unrolled", "loops", "traced"])
def test_equals_float64_and_the_gradient_of_the_formula(name, kind):
    tensors, _, intervals = inputs(name)
    given = jnp.asarray(intervals) if kind == "traced" else intervals
    config = UNROLLED if kind == "unrolled" else LOOPS
    got, (out, lse) = gradients(name, given, implementation="xla", config=config)
    expected = oracle(*tensors, intervals, SHAPES[name][5])
    np.testing.assert_allclose(out, expected[0], atol=2e-5)
    np.testing.assert_allclose(lse, expected[1], atol=2e-5)
    assert np.isneginf(lse[:, SHAPES[name][0] // 2]).all() or SHAPES[name][0] == 1
    assert distance(got, gradients(name, implementation="reference")[0]) < 2e-5


def finite(arrays):
    return [np.where(np.isfinite(x), x, 0) for x in arrays]


@WAYS
def test_one_mask_for_all_of_a_batch(name, options):
    intervals = inputs(name)[2][:1]
    got = gradients(name, intervals, **options)
    for ours, expected in zip(got, gradients(name, intervals, implementation="reference"), strict=True):
        assert distance(finite(ours), finite(expected)) < 2e-5


@pytest.mark.sweep("mask-unrolled", "scale-loops", "lse_gradient-loops", "delta-unrolled")
@CONFIGS
@pytest.mark.parametrize("mutant", ["mask", "scale", "lse_gradient", "delta"])
def test_mistakes_are_noticed(monkeypatch, config, mutant):
    logits, delta = xla._logits, vjp.row_delta

    def mutated(q, k, intervals, first, scale, softcap):
        result = logits(q, k, intervals, first, scale * (1.01 if mutant == "scale" else 1.0), softcap)
        return (result[0], jnp.ones_like(result[1]), result[2]) if mutant == "mask" else result

    monkeypatch.setattr(xla, "_logits", mutated)
    if mutant == "lse_gradient":
        monkeypatch.setattr(vjp, "row_delta", lambda out, dout, dlse=None: delta(out, dout))
    if mutant == "delta":
        monkeypatch.setattr(vjp, "row_delta", lambda out, dout, dlse=None: -dlse)
    got, _ = gradients("fewer_queries", implementation="xla", config=config)
    assert distance(got, gradients("fewer_queries", implementation="reference")[0]) > 1e-3


@pytest.mark.parametrize("implementation", ["xla", "cpu"])
@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)])
def test_no_queries_or_no_keys(lengths, implementation):
    q, k = (jnp.ones((2, n, 2, 16)) for n in lengths)
    intervals = jnp.broadcast_to(jnp.array([0, 3]), (1, lengths[0], 2))
    call = functools.partial(flash_attention, intervals=intervals, return_lse=True, implementation=implementation)
    (out, lse), pullback = jax.vjp(call, q, k, k)
    assert not out.any() and np.isneginf(lse).all()
    assert [x.shape for x in pullback((out, jnp.zeros_like(lse)))] == [q.shape, k.shape, k.shape]


@WAYS
def test_parts_of_the_keys_merge_and_their_gradients_add_up(name, options):
    (q, k, v), (w, _), intervals = inputs(name)
    of = backend(options["implementation"])
    options = {"scale": q.shape[-1] ** -0.5, "softcap": None, "config": options.get("config")}
    cuts = [(0, 11), (11, 30), (30, k.shape[1])]
    results = [of.forward(q, k[:, a:b], v[:, a:b], jnp.asarray(intervals - a), **options) for a, b in cuts]
    assert any(np.isneginf(lse[:, :10]).any() for _, lse in results), "some row should see none of a part"
    out, lse = functools.reduce(merge, results)
    expected = oracle(q, k, v, intervals, None)
    np.testing.assert_allclose(out, expected[0], atol=2e-5)
    np.testing.assert_allclose(lse, expected[1], atol=2e-5)
    rows = (lse, vjp.row_delta(out, w), w)
    parts = [of.backward(q, k[:, a:b], v[:, a:b], *rows, jnp.asarray(intervals - a), **options) for a, b in cuts]
    got = sum(x[0] for x in parts), *(np.concatenate([x[i] for x in parts], axis=1) for i in (1, 2))
    loss = lambda *x: (w * flash_attention(*x, intervals=intervals, implementation="reference")).sum()  # noqa: E731
    assert distance(got, jax.grad(loss, (0, 1, 2))(q, k, v)) < 2e-5


@pytest.mark.parametrize("hidden", [slice(27, None), slice(0, 9)], ids=["future", "past"])
@pytest.mark.parametrize("traced", [False, True])
def test_blocks_that_nobody_sees_are_not_computed(hidden, traced):
    """A value that is not a number, times the weight 0, would be not a number."""
    (q, k, v), _, _ = inputs("fewer_queries")
    intervals = self_intervals(45, 7)[:, 16:24]  # sees keys 10 to 23, of the tiles 9 to 17 and 18 to 26
    v = v.copy()
    v[:, hidden] = np.nan
    call = lambda q, k: flash_attention(  # noqa: E731
        q, k, v, intervals=jnp.asarray(intervals) if traced else intervals, implementation="xla", config=LOOPS
    )
    out, pullback = jax.vjp(call, q[:, :8], k)
    assert np.isfinite(out).all() and all(np.isfinite(x).all() for x in pullback(jnp.ones_like(out)))


@WAYS
def test_the_same_bits_every_time_and_in_bfloat16_within_a_percent(name, options):
    (q, k, v), (w, _), intervals = inputs(name)
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]

    @jax.jit
    def both(q, k, v):
        out, pullback = jax.vjp(lambda *x: flash_attention(*x, intervals=intervals, **options), q, k, v)
        return out, *pullback(jnp.asarray(w, out.dtype))

    one, other = both(*rounded), both(*rounded)
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert [x.dtype for x in one] == [jnp.bfloat16] * 4
    expected, _ = oracle(*rounded, intervals, None)
    assert np.sqrt(np.mean((np.float64(one[0]) - expected) ** 2)) < 0.01 * np.sqrt(np.mean(expected**2))


@WAYS
def test_inside_scan_remat_and_vmap(name, options):
    (q, k, v), _, intervals = inputs({"fewer_queries": "softcap", "tiles": "one_tile"}[name])
    intervals = np.stack([intervals, intervals[:, ::-1]])

    def gradient(**options):
        def attend(q, intervals):
            return flash_attention(q, k, v, intervals=intervals, **options)

        def body(q, _):
            return q + jax.vmap(jax.checkpoint(attend), (None, 0))(q, intervals).sum(0), None

        return jax.jit(jax.grad(lambda q: jnp.square(jax.lax.scan(body, q, None, length=2)[0]).sum()))(q)

    assert distance([gradient(**options)], [gradient(implementation="reference")]) < 2e-5


def test_memory_of_loops_grows_with_length_not_its_square():
    def memory(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        config = XlaConfig(max_blocks=0, tile_q=32, tile_kv=64)
        loss = lambda q, k, v: flash_attention(q, k, v, implementation="xla", config=config).sum()  # noqa: E731
        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    assert memory(4096) < 2.2 * memory(2048)
    assert memory(4096) < 0.2 * 4096**2 * 4  # less than a fifth of one head's scores


@pytest.mark.parametrize(
    ("length", "expected"), [(1, (1, 1)), (300, (150, 300)), (512, (256, 512)), (1001, (251, 501))]
)
def test_tiles_fit_the_length(length, expected):
    assert XlaConfig().tiles(length, length) == expected


@pytest.mark.parametrize("segmented", [False, True])
def test_an_encoder_sees_all_of_its_segment(segmented):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, 20, 2, 8)).astype(np.float32) for _ in range(3))
    segments = np.repeat([[1, 2, 0], [1, 1, 2]], [7, 9, 4], axis=1).astype(np.int32)
    config = XlaConfig(block=8)
    ids = jnp.asarray(segments) if segmented else None
    out = flash_attention(q, k, v, segment_ids=ids, causal=False, implementation="xla", config=config)
    seen = segments[:, :, None] == segments[:, None] if segmented else np.ones((2, 20, 20), bool)
    logits = np.einsum("bqhd,bkhd->bqhk", *(x.astype(np.float64) for x in (q, k))) / np.sqrt(8)
    weights = np.where(seen[:, :, None], np.exp(logits), 0)
    expected = np.einsum("bqhk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    with pytest.raises(ValueError, match="window=3 with causal=False"):
        flash_attention(q, k, v, causal=False, window=3)
