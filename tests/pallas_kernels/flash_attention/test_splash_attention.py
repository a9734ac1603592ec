"""Splash attention in Pallas's interpreter: against the reference, on one device and on a mesh; when it is chosen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pallas_kernels import fallback
from pallas_kernels.flash_attention import flash_attention, splash, xla  # noqa: F401 xla is patched by name

# length, heads, kv_heads, head_dim, segments, options. 384 tokens are three blocks of 128.
CASES = {
    "segments": (384, 4, 2, 64, True, {}),
    "window_scale": (256, 2, 1, 128, True, {"window": 40, "scale": 0.3}),
    "window_beyond_length": (128, 2, 2, 64, False, {"window": 1000}),
    "softcap": (256, 2, 2, 64, False, {"softcap": 3.0}),
    "encoder": (128, 2, 2, 64, True, {"causal": False}),
}


def _case(name):
    length, heads, kv_heads, head_dim, segments, options = CASES[name]
    rng = np.random.default_rng(0)
    query, key, value = (
        rng.normal(size=(4, length, n, head_dim)).astype(np.float32) for n in (heads, kv_heads, kv_heads)
    )
    ids = rng.integers(0, 2, (4, length)).cumsum(1) // 30 + 1 if segments else None
    return (2 * query, key, value), ids, options


def _gradients(implementation, inputs, ids, options):
    """The output and the gradients, the cotangent being random."""
    weights = np.random.default_rng(2).normal(size=inputs[0].shape).astype(np.float32)

    def loss(q, k, v, ids):
        out = flash_attention(q, k, v, segment_ids=ids, implementation=implementation, **options)
        return (weights * out).sum(), out

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (_, out), gradients = run(*inputs, ids)
    return out, *gradients


@pytest.mark.sweep("segments", "window_scale")
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_with_gradients(name):
    for ours, reference in zip(_gradients("splash", *_case(name)), _gradients("reference", *_case(name)), strict=True):
        assert np.abs(reference).max() > 1
        np.testing.assert_allclose(ours, reference, atol=2e-5 * np.abs(reference).max())


@pytest.mark.slow
def test_each_device_attends_with_its_own_rows_and_heads():
    inputs, ids, options = _case("segments")
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 3)
    with jax.set_mesh(mesh):
        rows = PartitionSpec(("data", "fsdp"), None)
        heads = PartitionSpec(("data", "fsdp"), None, "tensor", None)
        placed = tuple(jax.device_put(x, NamedSharding(mesh, heads)) for x in inputs)
        outputs = _gradients("splash", placed, jax.device_put(ids, NamedSharding(mesh, rows)), options)
        assert all(x.sharding.spec == heads for x in outputs)
    for ours, alone in zip(outputs, _gradients("splash", inputs, ids, options), strict=True):
        np.testing.assert_allclose(np.asarray(ours), alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "dtype", "window", "supported"),
    [
        ((1, 256, 2, 128), jnp.bfloat16, None, True),
        ((1, 384, 2, 64), jnp.float32, 9, True),
        ((1, 200, 2, 128), jnp.bfloat16, None, False),
        ((1, 256, 2, 96), jnp.bfloat16, None, False),
        ((1, 256, 2, 128), jnp.float16, None, False),
        ((1, 256, 2, 128), jnp.bfloat16, jnp.array(4), False),
    ],
)
def test_what_splash_supports(shape, dtype, window, supported):
    query = jnp.zeros(shape, dtype)
    assert (splash.why_not(query, window, None) is None) == supported
    if not supported:
        with pytest.raises(ValueError, match="'splash' does not support this: "):
            flash_attention(query, query, query, window=window, implementation="splash")


@pytest.mark.parametrize(
    ("platform", "head_dim", "chosen"),
    [("tpu", 128, "splash"), ("tpu", 96, "xla"), ("gpu", 128, "cudnn"), ("gpu", 192, "xla"), ("cpu", 128, "xla")],
)
def test_auto_takes_the_kernel_of_the_platform(monkeypatch, caplog, platform, head_dim, chosen):
    """Where those of our own are not there."""

    def answer(name, query, *_, **__):
        called.append(name)
        return (query, query[..., 0]) if name == "xla" else query

    called: list[str] = []
    flash = "pallas_kernels.flash_attention."
    monkeypatch.setattr(flash + "_built", lambda name: False)
    monkeypatch.setattr(flash + "platform", lambda: platform)
    for name, function in (("xla", "forward"), ("cudnn", "flash_attention"), ("splash", "flash_attention")):
        monkeypatch.setattr(f"{flash}{name}.{function}", functools.partial(answer, name))
    x = jnp.zeros((1, 128, 2, head_dim), jnp.bfloat16)
    fallback._say.cache_clear()
    for _ in range(2):
        flash_attention(x, x, x)
    assert called == [chosen] * 2
    said = [record.getMessage() for record in caplog.records if "flash_attention: " in record.getMessage()]
    assert len(said) == (chosen == "xla" and platform != "cpu"), said
    assert all(f"head_dim={head_dim}" in line for line in said)
