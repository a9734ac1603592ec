"""What the compiler for an absent H200 says of the GPU kernels at real models' shapes."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.absent import compile_for, reports
from pallas_kernels.cases import all_cases
from pallas_kernels.paged_attention import QUANTIZED, PagedCache, write
from pallas_kernels.paged_attention.cases import SHAPES
from pallas_kernels.paged_attention.gpu_config import SMEM_BYTES, heuristic, smem_bytes

pytestmark = pytest.mark.cuda

CASES = [case.name for case in all_cases() if case.name.startswith("paged_attention/") and "h200" in case.families]
# Sums of 256 columns and the addresses of four buffers: some that do not change within the loop are kept in memory.
SPILLS = {f"paged_attention/ragged/gemma3_4b/page64/{kept}": 68 for kept in ("int8", "float8_e4m3fn")}


# One of each kind; tests marked slow compile the rest.
SOME = {
    "decode/llama3_8b/page16/bfloat16",
    "decode/llama3_8b/page64/bfloat16",
    "decode/llama3_8b/page64/int8",
    "decode/llama3_8b/page128/float8_e4m3fn",
    "decode/gemma3_4b/page64/bfloat16",
    "decode/llama3_70b/page64/bfloat16",
    "ragged/llama3_8b/page16/bfloat16",
    "ragged/qwen3_30b/page64/float8_e4m3fn",
    "ragged/gemma3_4b/page64/int8",
    "invariant/llama3_8b/page64/bfloat16",
}
assert set(CASES) > {f"paged_attention/{name}" for name in SOME}


@pytest.mark.parametrize(
    "name",
    [name if name.partition("/")[2] in SOME else pytest.param(name, marks=pytest.mark.slow) for name in CASES],
)
def test_kernels_fit_and_use_tensor_cores_and_the_copy_engine(name):
    (report,) = reports("h200", [name]).values()
    assert "error" not in report, report["error"]
    attention = [kernel for kernel in report["kernels"] if not kernel["name"].endswith("merge")]
    assert len(attention) == (2 if "/ragged/" in name else 1)
    for kernel in report["kernels"]:
        assert kernel["smem_bytes"] <= SMEM_BYTES
        assert max(kernel["spill_stores"], kernel["spill_loads"]) <= SPILLS.get(name, 0), kernel
        assert kernel["tma_loads"] > 0 and not kernel["mma_sync"]
    _, _, model, page, dtype = name.split("/")
    head_dim, quantized = SHAPES[model][2], dtype in QUANTIZED
    config = heuristic(head_dim, int(page.removeprefix("page")), quantized)
    for kernel in attention:
        wide = not kernel["name"].endswith("split")
        said = smem_bytes(*config.shape(wide=wide), head_dim, quantized, wide=wide)
        assert 0 <= said - kernel["smem_bytes"] <= 1024
        assert kernel["wgmma"] >= 12
        # ptxas before 13.3 may corrupt a left operand in registers.
        assert kernel["wgmma_register_operand"] == 0
    # No copy of the cache, nor of a layer of it.
    held = report["memory"]["argument"]
    assert report["memory"]["temp"] < held / 8


def test_writing_is_in_place(absent_gpus):
    cache = jax.eval_shape(lambda: PagedCache.zeros(4, 1024, 64, 8, 128, jnp.int8))
    new = jax.ShapeDtypeStruct((64, 8, 128), jnp.bfloat16)
    layer, slot = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((64,), jnp.int32)
    donating = jax.jit(write, donate_argnums=0)
    memory = compile_for("h200", donating, cache, layer, new, new, slot).memory_analysis()
    assert memory.temp_size_in_bytes < 2**22
