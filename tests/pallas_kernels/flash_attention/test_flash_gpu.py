"""The GPU kernels in Pallas's interpreter, against the float32 reference and its derivative."""

import dataclasses

import gpu_flash_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention import flash_attention, gpu, gpu_config, xla
from pallas_kernels.flash_attention.intervals import self_intervals

interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="JAX has an interpreter of Mosaic GPU kernels from 0.11"
)
SMALL = gpu.GpuConfig(block_kv=64)

# One program each; masks are data.
SHAPES = {
    "grouped": cases.Shape(config=SMALL),
    "float32 out, capped": cases.Shape(
        head_dim=96, queries=63, keys=200, heads=3, kv_heads=1, batch=1, dtype=jnp.float16, out_dtype=jnp.float32,
        softcap=3.0, config=dataclasses.replace(SMALL, warpgroups=1, stages=3, dq_stages=1, dq_warpgroups=1),
    ),
    "wide": cases.Shape(head_dim=256, queries=65, keys=65, heads=1, kv_heads=1, batch=1),
    "one token": cases.Shape(queries=1, keys=1, heads=2, kv_heads=1, batch=1),
}  # fmt: skip
QUICK = {
    "grouped": ("causal", "anything", "few rows see"),
    "float32 out, capped": ("anything", "few rows see", "all"),
    "wide": ("causal", "anything"),
    "one token": ("causal", "nothing"),
}
SLOW = {
    "default": cases.Shape(head_dim=128, queries=129, keys=257, heads=2, kv_heads=2, batch=1),
    "192": cases.Shape(head_dim=192, queries=100, keys=100, heads=2, kv_heads=1, batch=1),
    "three warpgroups": cases.Shape(
        queries=385, keys=385, batch=1, config=dataclasses.replace(SMALL, warpgroups=3, stages=4)
    ),
    "wide rows": cases.Shape(
        queries=300, keys=300, batch=1, config=dataclasses.replace(SMALL, block_q=128, take_turns=False)
    ),
    "wide, capped, grouped": cases.Shape(head_dim=256, queries=127, keys=127, batch=1, softcap=3.0),
    "float32 out, wide": cases.Shape(head_dim=256, queries=70, keys=70, heads=2, kv_heads=1, out_dtype=jnp.float32),
    "two groups": cases.Shape(heads=6, kv_heads=2, softcap=4.0, config=SMALL),
    "80": cases.Shape(head_dim=80, queries=64, keys=128, batch=1, dtype=jnp.float16),
}


@pytest.mark.sweep("float32 out, capped")
@interpreted
@pytest.mark.parametrize("name", SHAPES)
def test_kernels_give_what_the_formula_gives(name):
    shape = SHAPES[name]
    programs = cases.programs(shape)
    found = cases.masks(shape.queries, shape.keys, shape.batch)
    for mask in QUICK[name]:
        cases.check(shape, *programs, found[mask])


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("name", [*SHAPES, *SLOW])
def test_all_masks_in_other_tiles_and_head_sizes(name):
    shape = (SHAPES | SLOW)[name]
    programs = cases.programs(shape)
    for mask in cases.masks(shape.queries, shape.keys, shape.batch).values():
        cases.check(shape, *programs, mask)


@interpreted
def test_through_the_public_function():
    """One mask for the whole batch, and gradients by way of the log-sum-exp."""
    shape = cases.Shape(queries=70, keys=70, batch=1)
    q, k, v, dout, dlse = shape.operands()

    def loss(implementation, *operands):
        out, lse = flash_attention(*operands, window=40, implementation=implementation, return_lse=True)
        return jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32)) + jnp.sum(lse * dlse)

    mine = cases.finished(jax.grad(lambda *x: loss("gpu", *x), (0, 1, 2)))(q, k, v)
    theirs = jax.grad(lambda *x: loss("reference", *x), (0, 1, 2))(*(x.astype(jnp.float32) for x in (q, k, v)))
    for own, other in zip(mine, theirs, strict=True):
        cases.close(own, other)


@interpreted
def test_vmap_is_a_batch():
    shape = cases.Shape(queries=64, keys=64)
    q, k, v, *_ = shape.operands()
    mask = jnp.asarray(self_intervals(64))
    attend = lambda q, k, v: gpu.forward(q, k, v, mask, scale=0.1, softcap=None, config=SMALL)  # noqa: E731
    out, lse = cases.finished(jax.vmap(attend))(*(x[:, None] for x in (q, k, v)))
    for mine, theirs in zip((out[:, 0], lse[:, 0]), xla.forward(q, k, v, mask, scale=0.1, softcap=None), strict=True):
        cases.close(mine, theirs)


def test_no_queries_or_no_keys():
    for queries, keys in ((0, 3), (3, 0)):
        shape = cases.Shape(queries=queries, keys=keys)
        q, k, v, dout, dlse = shape.operands()
        mask = np.zeros((1, queries, 2), np.int32)
        out, lse = gpu.forward(q, k, v, mask, **shape.options)
        assert out.shape == q.shape and not out.any() and np.isneginf(lse).all()
        gradients = gpu.backward(q, k, v, lse, dlse, dout, mask, **shape.options)
        assert [x.shape for x in gradients] == [q.shape, k.shape, v.shape] and not any(x.any() for x in gradients)


def test_what_is_not_supported_is_said():
    def why_not(dtype=jnp.bfloat16, head_dim=128, config=None, kv_dtype=None):
        q, k = jnp.zeros((1, 8, 2, head_dim), dtype), jnp.zeros((1, 8, 1, head_dim), kv_dtype or dtype)
        return gpu.why_not(q, k, k, softcap=None, config=config)

    assert why_not() is None and why_not(jnp.float16, 96) is None and why_not(head_dim=256) is None
    assert "query is float32" in why_not(jnp.float32)
    assert "key float16" in why_not(kv_dtype=jnp.float16)
    assert "head_dim is 320" in why_not(head_dim=320)
    assert "is not a GpuConfig" in why_not(config=xla.XlaConfig())
    assert "config.block_kv=100; it must be a positive multiple of 64" in why_not(config=gpu.GpuConfig(block_kv=100))
    assert "config.stages=1; it must be at least 2" in why_not(config=gpu.GpuConfig(stages=1))
    assert "config.warpgroups=4; choose 1, 2, 3" in why_not(config=gpu.GpuConfig(warpgroups=4))
    assert "forward kernel needs 329216 bytes" in why_not(config=gpu.GpuConfig(stages=4))
    with pytest.raises(ValueError, match=r"implementation='gpu' does not support this: query is float32"):
        flash_attention(*[jnp.zeros((1, 8, 1, 64))] * 3, implementation="gpu")


def test_only_hopper(monkeypatch):
    q = jnp.zeros((1, 8, 2, 64), jnp.bfloat16)
    monkeypatch.setattr(gpu_config, "platform", lambda: "gpu")
    for kind, fits in {"NVIDIA H200": True, "NVIDIA H100 80GB HBM3": True, "NVIDIA A100-SXM4-40GB": False}.items():
        monkeypatch.setattr(gpu_config, "chip", lambda kind=kind: kind)
        assert (gpu.why_not(q, q, q, softcap=None, config=None) is None) == fits


@pytest.mark.skipif(hasattr(plgpu, "InterpretGPUParams"), reason="JAX from 0.11 interprets them")
def test_an_older_jax_needs_a_gpu():
    q, k, v, *_ = cases.Shape().operands()
    with pytest.raises(NotImplementedError, match=r"runs off a GPU only in the interpreter of JAX 0\.11"):
        gpu.forward(q, k, v, np.zeros((1, 130, 2), np.int32), scale=1.0, softcap=None)


@pytest.mark.parametrize("head_dim", (32, 64, 96, 128, 192, 256))
def test_defaults_fit(head_dim):
    for softcap in (None, 50.0):
        gpu.heuristic(head_dim, softcap).check(head_dim)
