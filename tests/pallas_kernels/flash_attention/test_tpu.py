"""The TPU kernels, in Pallas's interpreter, against the float32 reference and its derivatives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.flash_attention import flash_attention, tpu, tpu_config, tpu_forward, tpu_scores, tpu_tiles

# Tiles so small that short sequences have several, each multiplied in parts.
SMALL = tpu.TpuConfig(
    block_q=256,
    block_kv=256,
    rows=128,
    columns=128,
    block_q_backward=128,
    block_kv_backward=256,
    rows_backward=128,
    columns_backward=128,
)
SPLIT = dataclasses.replace(SMALL, fused_backward=False)


def normal(seed, shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def operands(heads, kv_heads, head_dim, queries, keys, dtype=jnp.float32, batch=2):
    shapes = [(batch, queries, heads, head_dim)] + [(batch, keys, kv_heads, head_dim)] * 2
    return [normal(i, shape, dtype) for i, shape in enumerate(shapes)]


def ragged(queries, keys, batch=2):
    """Intervals of any place and length, a third of them empty, some outside of the keys."""
    random = np.random.default_rng(0)
    start = random.integers(-20, keys, (batch, queries))
    stop = start + random.integers(-keys // 2, keys, (batch, queries))
    return np.stack([start, stop], axis=-1).astype(np.int32)


def everything(queries, keys):
    return np.broadcast_to(np.array([0, keys], np.int32), (1, queries, 2))


def nothing(queries, keys):
    return np.zeros((1, queries, 2), np.int32) + keys // 2


def results(implementation, q, k, v, config=None, **options):
    """Output, log-sum-exp and the gradients of a function of both."""

    @jax.jit
    def run(q, k, v):
        def attend(q, k, v):
            out, lse = flash_attention(
                q, k, v, implementation=implementation, config=config, return_lse=True, **options
            )
            return out.astype(jnp.float32), lse

        (out, lse), vjp = jax.vjp(attend, q, k, v)
        return out, lse, *vjp((normal(3, out.shape), jnp.where(jnp.isneginf(lse), 0.0, normal(4, lse.shape))))

    return [np.asarray(x, np.float32) for x in run(q, k, v)]


def errors(q, k, v, config=SMALL, **options):
    """Of each result, the largest error as a share of the largest number; infinite where one alone is blind."""
    expected = results("reference", *(x.astype(jnp.float32) for x in (q, k, v)), **options)
    shares = []
    for got, want in zip(results("tpu", q, k, v, config, **options), expected, strict=True):
        blind = np.isneginf(want)
        if (np.isneginf(got) != blind).any() or np.isnan(got).any():
            return [np.inf]
        scale = max(np.abs(want[~blind]).max(initial=0), 1e-3)
        shares.append(np.abs(got[~blind] - want[~blind]).max(initial=0) / scale)
    return shares


SEGMENTS = np.array([[0] * 100 + [1] * 200 + [2] * 84, [5] * 384])


@pytest.mark.sweep("shape1-options1-config1", "shape9-options9-config9")
@pytest.mark.parametrize(
    ("shape", "options", "config"),
    [
        ((2, 1, 64, 257, 257), {}, SMALL),
        ((4, 2, 128, 300, 300), {"window": 100, "softcap": 3.0}, SMALL),
        ((4, 2, 128, 300, 300), {"window": 100, "softcap": 3.0}, SPLIT),
        ((1, 1, 96, 255, 255), {}, SPLIT),
        ((2, 1, 64, 384, 384), {"segment_ids": SEGMENTS, "window": 150}, SMALL),
        ((2, 2, 256, 130, 300), {"intervals": ragged(130, 300)}, SMALL),
        ((6, 2, 64, 300, 520), {"intervals": ragged(300, 520)}, SPLIT),
        ((3, 1, 64, 1, 1), {}, SPLIT),
        ((2, 1, 64, 1, 513), {"intervals": everything(1, 513)}, SMALL),
        ((2, 1, 64, 256, 512), {"intervals": everything(256, 512)}, SPLIT),
        ((2, 1, 64, 130, 300), {"intervals": nothing(130, 300)}, SMALL),
    ],
)
def test_outputs_and_gradients_are_the_reference_s(shape, options, config):
    options = {name: jnp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    assert max(errors(*operands(*shape), config, **options)) < 1e-5


@pytest.mark.sweep("config0")
@pytest.mark.parametrize("config", [SMALL, SPLIT])
def test_bfloat16_is_within_its_rounding(config):
    # Operands are rounded to 2**-9, and so are the weights, the scaled queries and the results.
    assert max(errors(*operands(4, 2, 64, 300, 300, jnp.bfloat16), config, softcap=20.0)) < 1e-2


@pytest.mark.slow
def test_a_part_of_the_keys_and_results_of_another_type():
    """As a step of ring attention has it: probabilities are those of all keys, sums are kept in float32."""
    q, k, v = operands(2, 1, 64, 130, 256, jnp.bfloat16)
    whole, first, second = (jnp.broadcast_to(jnp.array(x), (1, 130, 2)) for x in ([0, 256], [0, 100], [100, 256]))
    options = {"scale": 0.125, "softcap": None, "out_dtype": jnp.float32, "config": SMALL}
    out, lse = tpu.forward(q, k, v, whole, **options)
    gradient = normal(3, out.shape, jnp.bfloat16)
    delta = (out * gradient.astype(jnp.float32)).sum(-1)
    together, *parts = (tpu.backward(q, k, v, lse, delta, gradient, x, **options) for x in (whole, first, second))
    assert out.dtype == jnp.float32 and {x.dtype for x in together} == {jnp.dtype("float32")}
    for want, a, b in zip(together, *parts, strict=True):
        np.testing.assert_allclose(a + b, want, atol=3e-3 * np.abs(want).max())


def test_within_vmap_remat_and_scan():
    q, k, v = operands(2, 1, 64, 130, 130)
    stacked = jnp.stack([q, q[::-1]])

    def loss(q, implementation, config):
        def layer(x, _):
            attend = jax.vmap(
                lambda q: flash_attention(q, k, v, window=70, implementation=implementation, config=config)
            )
            return x + jax.checkpoint(attend)(x), None

        return jnp.sin(jax.lax.scan(layer, q, length=2)[0]).sum()

    got = jax.jit(jax.grad(loss), static_argnums=(1, 2))(stacked, "tpu", SMALL)
    want = jax.grad(loss)(stacked, "reference", None)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.slow
def test_entries_that_are_too_many_for_scalar_memory_go_in_parts(monkeypatch):
    q, k, v = operands(1, 1, 64, 130, 300, batch=3)
    options = {"intervals": jnp.asarray(ragged(130, 300, batch=3))}
    monkeypatch.setattr(tpu_tiles, "MAX_STEPS", 8)
    assert tpu._steps(SMALL, q, k) == 4
    assert max(errors(q, k, v, **options)) < 1e-5
    monkeypatch.setattr(tpu_tiles, "MAX_STEPS", 3)
    assert "too many tiles" in tpu.why_not(q, k, v, softcap=None, config=SMALL)


def test_steps_are_the_tiles_in_which_something_is_seen():
    intervals, (block_q, block_kv, keys) = ragged(512, 500), (128, 256, 500)
    intervals[0, 128:256] = 7  # a tile that sees nothing
    intervals[1, 256:384] = (0, 256)  # a tile that sees another whole
    intervals = np.clip(intervals, 0, keys)
    steps = tpu_tiles.steps(*tpu_tiles.visits(jnp.asarray(intervals), block_q, block_kv, keys))
    major, minor = (np.asarray(x)[: int(steps.count)] for x in (steps.major, steps.minor))
    listed = list(zip(tpu_tiles.batch_of(major), tpu_tiles.major_of(major), tpu_tiles.minor_of(minor), strict=True))
    key = np.arange(512)
    seen = (intervals[..., :1] <= key) & (key < intervals[..., 1:])
    tiles = seen.reshape(2, 4, 128, 2, 256)
    visible, full = tiles.any((2, 4)), tiles.all((2, 4))
    expected = [(b, i, j) for b in range(2) for i in range(4) for j in range(2) if visible[b, i, j]]
    assert listed == sorted([*expected, (0, 1, 0)])
    for (b, i, j), flags in zip(listed, minor, strict=True):
        own = [x for x in listed if x[:2] == (b, i)]
        assert bool(flags & tpu_tiles.FULL) == full[b, i, j]
        assert bool(flags & tpu_tiles.MASKED) == (visible[b, i, j] and not full[b, i, j])
        assert bool(flags & tpu_tiles.FIRST) == (own[0] == (b, i, j))
        assert bool(flags & tpu_tiles.LAST) == (own[-1] == (b, i, j))
        entry = [x for x in listed if x[0] == b]
        assert bool(flags & tpu_tiles.ENTRY_FIRST) == (entry[0] == (b, i, j))
        assert bool(flags & tpu_tiles.ENTRY_LAST) == (entry[-1] == (b, i, j))
    assert full[1, 2, 0] and not full[..., 1].any()


@pytest.mark.parametrize("length", [1, 127, 128, 129, 640, 1100, 5000, 8192])
def test_tiles_cover_a_length_with_little_left_over(length):
    size = tpu_tiles.fit(length, 1024)
    count = -(-length // size)
    assert size % 128 == 0 and size <= 1024 and count == -(-length // 1024)
    assert count * size - length < 128 * count
    parts = tpu_tiles.chunks(size, 512)
    assert [start for start, _ in parts] == [sum(n for _, n in parts[:i]) for i in range(len(parts))]
    assert sum(n for _, n in parts) == size and all(n % 128 == 0 and 0 < n <= 512 for _, n in parts)


def one_tile_off(*arguments, right=tpu_tiles.visits):
    return [jnp.roll(x, 1, axis=2) for x in right(*arguments)]


@pytest.mark.sweep("no mask", "tiles off by one")
@pytest.mark.parametrize(
    ("module", "name", "mutant"),
    [
        (tpu_scores, "NO_SCORE", 0.0),
        (tpu_forward, "hide", lambda scores, *_: scores),
        (tpu_forward, "LOG2E", 1.0),
        (tpu_tiles, "visits", one_tile_off),
    ],
    ids=["masked scores count", "no mask", "logarithm of the wrong base", "tiles off by one"],
)
def test_a_mutant_is_caught(module, name, mutant, monkeypatch):
    monkeypatch.setattr(module, name, mutant)
    assert max(errors(*operands(1, 1, 64, 300, 300), window=200)) > 1e-2


def test_what_is_not_supported_is_named():
    def why_not(dtype=jnp.float32, head_dim=64, config=None, queries=300):
        q, k = (jax.ShapeDtypeStruct((1, queries, 2, head_dim), dtype) for _ in range(2))
        return tpu.why_not(q, k, k, softcap=None, config=config)

    assert why_not() is None and why_not(jnp.bfloat16, 256) is None
    assert "float16" in why_not(jnp.float16)
    assert "head_dim=320" in why_not(head_dim=320) and "head_dim=65" in why_not(head_dim=65)
    assert "TpuConfig" in why_not(config=512)
    huge = tpu.TpuConfig(block_q=8192, block_kv=8192, rows=8192, columns=8192)
    assert "VMEM" in why_not(config=huge, queries=8192)
    with pytest.raises(ValueError, match="VMEM"):
        tpu.forward(*operands(1, 1, 256, 8192, 8192, batch=1), everything(1, 1), scale=1.0, softcap=None, config=huge)
    with pytest.raises(ValueError, match="rows=100; it must be a positive multiple of 128"):
        tpu.TpuConfig(rows=100)


def test_gradients_come_from_one_kernel_where_the_keys_sums_fit():
    def fuses(keys):
        q, k = (jax.ShapeDtypeStruct((1, n, 8, 128), jnp.bfloat16) for n in (1024, keys))
        return tpu_config.fuses(tpu.TpuConfig(), q, k)

    assert fuses(8192) and not fuses(2**17)
