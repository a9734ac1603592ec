"""Attention against the formula in float64 NumPy, one query at a time, written apart from the shipped reference."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.flash_attention import cudnn, flash_attention, own_backend
from pallas_kernels.flash_attention.xla import XlaConfig


def _inputs(batch, length, heads, kv_heads, head_dim, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)

    def draw(n):
        return rng.normal(size=(batch, length, n, head_dim)).astype(dtype)

    return 2 * draw(heads), draw(kv_heads), draw(kv_heads)  # peaked softmax: logits of deviation 2


def _segments(batch, length):
    """Documents of uneven length, different in each row, padding (0) at the end."""
    rng = np.random.default_rng(1)
    cuts = np.sort(rng.integers(0, length, (batch, 3)), axis=1)
    ids = 1 + (np.arange(length)[None, :, None] >= cuts[:, None, :]).sum(-1)
    ids[:, length - length // 8 :] = 0
    return ids.astype(np.int32)


def _oracle(query, key, value, segment_ids=None, window=None, scale=None, softcap=None):
    query, key, value = (x.astype(np.float64) for x in (query, key, value))
    batch, length, heads, head_dim = query.shape
    group = heads // key.shape[2]
    scale = 1 / np.sqrt(head_dim) if scale is None else scale
    out = np.zeros_like(query)
    for b, h, i in itertools.product(range(batch), range(heads), range(length)):
        seen = [
            j
            for j in range(i + 1)
            if (window is None or i - j < window) and (segment_ids is None or segment_ids[b, i] == segment_ids[b, j])
        ]
        logits = key[b, seen, h // group] @ query[b, i, h] * scale
        if softcap is not None:
            logits = softcap * np.tanh(logits / softcap)
        weights = np.exp(logits - logits.max())
        out[b, i, h] = weights @ value[b, seen, h // group] / weights.sum()
    return out


# (length, heads, kv_heads, head_dim, window, segments, scale, softcap)
CASES = {
    "one_token": (1, 2, 1, 64, None, False, None, None),
    "one_token_window": (1, 2, 2, 8, 1, True, None, None),
    "short_of_a_block": (127, 4, 2, 64, None, True, None, None),
    "one_block": (128, 2, 2, 96, None, False, None, None),
    "block_and_one": (129, 3, 1, 128, None, True, 0.3, None),
    "ragged_blocks": (300, 4, 1, 16, None, True, None, 1.5),
    "window": (300, 2, 1, 16, 37, False, None, None),
    "window_and_segments": (300, 6, 2, 4, 128, True, None, 3.0),
    "window_across_blocks": (300, 1, 1, 32, 200, False, None, None),
    "window_of_one": (129, 2, 1, 8, 1, False, None, None),
    "window_beyond_length": (129, 2, 1, 8, 1000, False, None, None),
}


def _case(name):
    length, heads, kv_heads, head_dim, window, segments, scale, softcap = CASES[name]
    inputs = _inputs(2, length, heads, kv_heads, head_dim)
    options = {"window": window, "scale": scale, "softcap": softcap}
    return inputs, {**options, "segment_ids": _segments(2, length) if segments else None}


# The kernel for CPUs takes heads of a multiple of 16.
_IMPLEMENTATIONS = [
    (x, name) for x in ("xla", "reference", "cpu") for name in CASES if x != "cpu" or CASES[name][3] > 8
]


@pytest.mark.parametrize("implementation,name", _IMPLEMENTATIONS)
def test_equals_float64_softmax(name, implementation):
    inputs, options = _case(name)
    out = jax.jit(functools.partial(flash_attention, implementation=implementation, **options))(*inputs)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, _oracle(*inputs, **options), atol=2e-5)


@pytest.mark.parametrize("name", ["window_of_one", "window_and_segments", "window_beyond_length"])
def test_traced_window_equals_static(name):
    inputs, options = _case(name)
    window = options.pop("window")
    traced = jax.jit(lambda window: flash_attention(*inputs, window=window, implementation="xla", **options))
    np.testing.assert_allclose(traced(window), _oracle(*inputs, window=window, **options), atol=2e-5)


@pytest.mark.parametrize("name", ["block_and_one", "window_and_segments", "ragged_blocks"])
def test_gradients_equal_those_of_the_formula(name):
    inputs, options = _case(name)
    weights = np.random.default_rng(2).normal(size=inputs[0].shape).astype(np.float32)

    def gradients(implementation):
        def loss(q, k, v):
            return (weights * flash_attention(q, k, v, implementation=implementation, **options)).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*inputs)

    for ours, reference in zip(gradients("xla"), gradients("reference"), strict=True):
        assert np.abs(reference).max() > 1
        np.testing.assert_allclose(ours, reference, atol=1e-4)


def test_reference_gradient_is_the_slope_of_the_oracle():
    inputs, options = _case("window_and_segments")
    inputs = tuple(x[:1, :20] for x in inputs)
    options = {**options, "window": 5, "segment_ids": options["segment_ids"][:1, 130:150]}
    rng = np.random.default_rng(3)
    weights = rng.normal(size=inputs[0].shape)
    direction = [rng.normal(size=x.shape) for x in inputs]

    def loss(*inputs):
        return (weights * flash_attention(*inputs, implementation="reference", **options)).sum()

    slope = sum((g * d).sum() for g, d in zip(jax.grad(loss, (0, 1, 2))(*inputs), direction, strict=True))
    step = 1e-5
    ends = [
        (weights * _oracle(*(x + s * d for x, d in zip(inputs, direction, strict=True)), **options)).sum()
        for s in (step, -step)
    ]
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / (2 * step), rtol=1e-4)


def test_inside_scan_remat_and_vmap():
    query, key, value = (np.stack([x, x[::-1]]) for x in _inputs(2, 140, 2, 1, 8))

    def gradient(implementation):
        def attend(q, window):
            return flash_attention(q, key[0], value[0], window=window, implementation=implementation)

        def body(q, window):
            return q + jax.vmap(jax.checkpoint(attend), (0, None))(q, window), None

        def loss(q):
            return jnp.square(jax.lax.scan(body, q, jnp.array([3, 1000]))[0]).sum()

        return jax.jit(jax.value_and_grad(loss))(query)

    for ours, reference in zip(gradient("xla"), gradient("reference"), strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-4, atol=1e-3)


def test_large_logits_do_not_overflow():
    query, key, value = _inputs(1, 130, 1, 1, 16)
    out = flash_attention(1000 * query, key, value, implementation="xla")
    np.testing.assert_allclose(out, _oracle(1000 * query, key, value), atol=1e-2)


def test_bfloat16_stays_within_a_percent():
    inputs = _inputs(2, 200, 4, 2, 64)
    rounded = tuple(jnp.asarray(x, jnp.bfloat16) for x in inputs)
    out = flash_attention(*rounded, implementation="xla")
    assert out.dtype == jnp.bfloat16
    expected = _oracle(*(np.asarray(x, np.float64) for x in rounded))
    error = np.asarray(out, np.float64) - expected
    assert np.sqrt(np.mean(error**2)) < 0.01 * np.sqrt(np.mean(expected**2))


def test_long_sequences_run_in_loops():
    inputs = _inputs(1, 301, 2, 1, 8)
    options = {"segment_ids": _segments(1, 301), "window": 90}

    def call(length, config):
        return jax.make_jaxpr(lambda q: flash_attention(q, q, q, implementation="xla", config=config))(
            jnp.zeros((1, length, 1, 8))
        )

    assert "while" not in str(call(2048, None)) and "while" in str(call(2049, None))
    out = flash_attention(*inputs, implementation="xla", config=XlaConfig(max_blocks=2), **options)
    np.testing.assert_allclose(out, _oracle(*inputs, **options), atol=2e-5)


def _lowered(window, length=1024):
    inputs = [jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)] * 3
    loss = lambda q, k, v: flash_attention(q, k, v, window=window, implementation="xla").sum()  # noqa: E731
    return jax.jit(jax.grad(loss, (0, 1, 2))).lower(*inputs)


def test_work_that_causality_and_a_static_window_hide_is_not_done():
    def flops(window):
        cost = _lowered(window).cost_analysis()
        return (cost[0] if isinstance(cost, list) else cost)["flops"]

    # 8 blocks: causality leaves 36 of 64 block pairs, a window of 128 leaves 15 of those.
    full = 8 * 8 * 128 * 128 * 2 * 16 * 2  # of one of the matmuls (two forward, five backward)
    assert flops(None) < 0.75 * 7 * full
    assert flops(128) < 0.5 * flops(None)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="JAX 0.10's CPU compiler drops barriers before it schedules")
def test_memory_grows_with_length_not_its_square():
    def memory(length):
        return _lowered(None, length).compile().memory_analysis().temp_size_in_bytes

    assert memory(1536) < 3 * memory(768)
    assert memory(1536) < 2 * 1536**2 * 4  # less than one score matrix


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((1, 4, 3, 8), (1, 4, 2, 8), (1, 4, 2, 8)), {}, "shapes do not fit"),
        (((1, 4, 2, 8), (1, 4, 2, 8), (1, 4, 1, 8)), {}, "shapes do not fit"),
        (((1, 4, 2, 8), (1, 5, 2, 8), (1, 5, 2, 8)), {}, "shapes do not fit"),
        (
            ((1, 4, 2, 8),) * 3,
            {"implementation": "triton"},
            "choose auto, xla, cpu, gpu, tpu, cudnn, splash, reference",
        ),
        (((1, 4, 2, 8),) * 3, {"implementation": "cudnn"}, "cudnn.* query is float32; cuDNN takes bfloat16"),
        (((1, 4, 2, 8),) * 3, {"implementation": "cudnn", "return_lse": True}, "return_lse cannot be given"),
        (((1, 4, 2, 8),) * 3, {"segment_ids": np.zeros((1, 3), int)}, r"segment_ids has shape \(1, 3\); .* \(1, 4\)"),
        (
            ((1, 4, 2, 8),) * 3,
            {"intervals": np.zeros((1, 3, 2), int)},
            r"intervals has shape \(1, 3, 2\); .* \(1, 4, 2\)",
        ),
        (((1, 4, 2, 8),) * 3, {"intervals": np.zeros((1, 4, 2), int), "window": 3}, "window cannot be given beside"),
        (((1, 4, 2, 8),) * 3, {"config": XlaConfig()}, "config=XlaConfig.* with implementation='auto'; name the one"),
        (((1, 4, 2, 8),) * 3, {"config": 3, "implementation": "xla"}, "config=3 is not an XlaConfig"),
    ],
)
def test_refuses(shapes, options, message):
    with pytest.raises(ValueError, match=message):
        flash_attention(*map(jnp.zeros, shapes), **options)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "window", "softcap", "supported"),
    [
        (64, jnp.bfloat16, None, None, True),
        (128, jnp.float16, 9, None, True),
        (64, jnp.float32, None, None, False),
        (256, jnp.bfloat16, None, None, False),
        (12, jnp.bfloat16, None, None, False),
        (64, jnp.bfloat16, None, 30.0, False),
        (64, jnp.bfloat16, jnp.array(4), None, False),
    ],
)
def test_what_cudnn_supports(head_dim, dtype, window, softcap, supported):
    assert (cudnn.why_not(jnp.zeros((1, 2, 1, head_dim), dtype), window, softcap) is None) == supported


def test_those_who_call_a_backend_are_given_one_of_ours():
    x = jnp.zeros((1, 4, 2, 8))
    assert own_backend("auto", x, x, x, softcap=None) == own_backend("xla", x, x, x, softcap=None) == "xla"
    with pytest.raises(ValueError, match="implementation='splash'; choose auto, xla, cpu, gpu, tpu"):
        own_backend("splash", x, x, x, softcap=None)
