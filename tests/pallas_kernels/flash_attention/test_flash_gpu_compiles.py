"""What NVIDIA's assembler says of the GPU kernels at real models' shapes, for an H200 that need not be here."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.absent import reports
from pallas_kernels.cases import Case
from pallas_kernels.chips import CHIPS
from pallas_kernels.flash_attention import gpu

# Heads, key/value heads, head size, soft-cap: at 8192 tokens and at a length of no whole tiles.
MODELS = {
    "llama3_8b": (32, 8, 128, None),
    "llama3_70b": (64, 8, 128, None),
    "qwen3_0_6b": (16, 8, 128, None),
    "gemma2_2b": (8, 4, 256, 50.0),
    "gemma3_1b": (4, 1, 256, None),
    "gpt2": (12, 12, 64, None),
    "phi3_mini": (32, 32, 96, None),
    "head_192": (16, 4, 192, None),
}
LENGTHS = (8192, 5003)
COUNTED_AS = {"flash_forward": "forward", "flash_backward_queries": "dq", "flash_backward_keys": "dkv"}


def _cases(name, length, dtype=jnp.bfloat16, out_dtype=None, config=None):
    heads, kv_heads, head_dim, softcap = MODELS[name]
    array = jax.ShapeDtypeStruct
    q, kv = array((1, length, heads, head_dim), dtype), array((1, length, kv_heads, head_dim), dtype)
    row, mask = array(q.shape[:-1], jnp.float32), array((1, length, 2), jnp.int32)
    options = {"scale": head_dim**-0.5, "softcap": softcap, "out_dtype": out_dtype, "config": config}
    yield Case("flash/forward", functools.partial(gpu.forward, **options), (q, kv, kv, mask), ("h200",))
    yield Case("flash/backward", functools.partial(gpu.backward, **options), (q, kv, kv, row, row, q, mask), ("h200",))


ALL = {
    f"{direction}_{name}_{length}": case
    for name in MODELS
    for length in LENGTHS
    for direction, case in zip(("FORWARD", "BACKWARD"), _cases(name, length), strict=True)
}
for name in ("llama3_8b", "gemma2_2b"):
    for direction, case in zip(("FORWARD", "BACKWARD"), _cases(name, 8192, out_dtype=jnp.float32), strict=True):
        ALL[f"{direction}_{name}_float32_out"] = case
ALL["FORWARD_float16"], ALL["BACKWARD_float16"] = _cases("llama3_8b", 8192, dtype=jnp.float16)
ALL["FORWARD_registers"], _ = _cases("llama3_8b", 8192, config=dataclasses.replace(gpu.heuristic(128), registers=True))
globals().update(ALL)  # `reports` finds a case as an attribute of its module


# One of each kind; tests marked slow compile the rest.
SOME = {
    *(f"{direction}_{name}" for direction in ("FORWARD", "BACKWARD") for name in ("llama3_8b_8192", "gemma2_2b_8192")),
    "FORWARD_head_192_8192",
    "BACKWARD_phi3_mini_5003",
    "FORWARD_gpt2_8192",
    "FORWARD_registers",
}
assert set(ALL) > SOME


@pytest.mark.cuda
@pytest.mark.parametrize("name", [name if name in SOME else pytest.param(name, marks=pytest.mark.slow) for name in ALL])
def test_kernels_keep_to_registers_and_shared_memory(name, pytestconfig, monkeypatch):
    monkeypatch.syspath_prepend(pytestconfig.rootpath / "tests/pallas_kernels/flash_attention")
    (report,) = reports("h200", [f"{__name__}:{name}"]).values()
    assert "error" not in report, report["error"]
    names = ("flash_forward",) if name.startswith("FORWARD") else ("flash_backward_queries", "flash_backward_keys")
    assert sorted(kernel["name"] for kernel in report["kernels"]) == sorted(names)
    for kernel in report["kernels"]:
        assert kernel["arch"] == "sm_90a"
        assert (kernel["spill_stores"], kernel["spill_loads"], kernel["stack"]) == (0, 0, 0), kernel
        assert not kernel["warnings"], "among these would be that matmuls wait for one another"
        assert kernel["smem_bytes"] <= CHIPS["NVIDIA H200"].smem_bytes
        assert kernel["wgmma"] > 0 and kernel["mma_sync"] == 0
        assert (kernel["wgmma_register_operand"] > 0) == (name == "FORWARD_registers")
        assert kernel["tma_loads"] >= 4
        if name.endswith("_8192"):
            # Little more than the check of a configuration counts: barriers, alignment, statistics.
            *_, head_dim, softcap = MODELS[name.removesuffix("_8192").partition("_")[2]]
            said = gpu.heuristic(head_dim, softcap).smem_bytes(-(-head_dim // 64) * 64)
            assert kernel["smem_bytes"] <= said[COUNTED_AS[kernel["name"]]] + 8192
