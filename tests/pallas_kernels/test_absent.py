"""Compiling for absent accelerators, and reading their compilers' reports."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.absent import (
    TARGETS,
    CompilerMissing,
    compile_for,
    devices,
    llo_report,
    ptxas_report,
    reports,
    tracing_for,
)
from pallas_kernels.cases import all_cases, find
from pallas_kernels.chips import CHIPS
from pallas_kernels.platform import chip, platform

TPUS = [name for name, target in TARGETS.items() if target.platform == "tpu"]


@pytest.fixture
def own_cases(monkeypatch, pytestconfig):
    """The module `absent_cases`, also for child processes."""
    monkeypatch.syspath_prepend(pytestconfig.rootpath / "tests/pallas_kernels")
    return "absent_cases"


@pytest.mark.parametrize("name", TPUS)
def test_a_program_knows_the_absent_chip_that_it_is_for(name, absent_tpus):
    seen = []

    def program(tree):
        seen.append((platform(), chip()))
        return tree["a"] @ tree["b"]

    shapes = {"a": jax.ShapeDtypeStruct((128, 256), jnp.bfloat16), "b": jax.ShapeDtypeStruct((256, 8), jnp.bfloat16)}
    compiled = compile_for(name, program, shapes)
    (device,) = {device for leaf in jax.tree.leaves(compiled.input_shardings) for device in leaf.device_set}
    assert seen == [("tpu", device.device_kind)] and device.device_kind in CHIPS
    assert device.num_cores == CHIPS[device.device_kind].cores
    assert platform() == "cpu"


@pytest.mark.parametrize("name", TARGETS)
def test_targets_and_chips_agree(name):
    target = TARGETS[name]
    with tracing_for(name):
        assert (platform(), chip()) == (target.platform, target.device_kind)
    assert (CHIPS[target.device_kind].smem_bytes > 0) == (target.platform == "gpu")


def test_a_missing_compiler_is_an_error_of_its_own(absent_tpus):
    with pytest.raises(CompilerMissing):
        devices("v5e", (3, 5))


@pytest.mark.slow
def test_tpu_kernels_are_read_and_a_case_that_fails_costs_no_other(own_cases, absent_tpus):
    names = [f"{own_cases}:{name}" for name in ("WRONG", "ABORTS", "TPU_PRODUCT")]
    wrong, aborts, product = reports("v5e", names).values()
    assert wrong["error"].startswith("TypeError: ") and "(3, 3)" in wrong["error"]
    assert "ended with status 86" in aborts["error"]
    (kernel,) = product["kernels"]
    assert kernel["name"].startswith("product")
    assert product["memory"]["argument"] == 2 * 2 * 1024**2
    # Blocks of x and out twice (one is computed, one is under way), y at least once.
    blocks = 2 * 256 * 1024 * (2 + 4) + 2 * 1024**2
    assert blocks <= kernel["vmem_bytes"] < 2 * blocks
    # Four matrix units of 128 by 128 take a row each in a cycle, and a bundle is about one.
    cycles = 256 * 1024**2 / (128 * 128) / 4
    busy = kernel["shares"]["MXU"] * kernel["hot_bundles"]
    assert cycles / 2 < busy < 2 * cycles
    assert kernel["hot_bundles"] <= kernel["bundles"] and 0 <= kernel["spill_stores"] < kernel["bundles"]


SCHEDULE = """== CAPACTIY:
MXU, XLU, VLOAD:FILL, VSTORE, VSTORE:SPILL
    4     2     3     1     1
== UTILIZATION:
0 1 0 1 0
"""


def test_the_hot_stretch_of_a_schedule(tmp_path):
    def write(number, name, rows):
        (tmp_path / f"17{number}-{name}-70-final_hlo-static-per-bundle-utilization.txt").write_text(SCHEDULE + rows)
        (tmp_path / f"17{number}-{name}-71-schedule-analysis_final_bundles.txt").write_text(
            "custom_call_target=tpu_custom_call" if name != "copy.2" else "fusion"
        )
        (tmp_path / f"17{number}-{name}-69-post-delay-converter.txt").write_text(
            "#allocation1 [shape = 'u8[16]', space=vmem, size = 0x10, offset = 0x20, scoped]\n"
            "#allocation2 [shape = 'u8[16]', space=smem, size = 0x10, offset = 0xf0, scoped]\n"
        )

    idle = "0 0 0 0 0\n" * 100
    write(2, "late.1", "4 0 3 0 1\n" + idle + "4 2 0 1 0\n0 2 0 0 0\n2 2 0 1 0\n" + idle)
    write(3, "vector-only", "0 2 0 0 0\n")
    write(1, "copy.2", idle)
    late, vector = llo_report(tmp_path)
    assert late == {
        "name": "late.1",
        "bundles": 205,
        "hot_bundles": 3,
        "shares": {"MXU": 0.5, "XLU": 1.0, "VLOAD:FILL": 0.0, "VSTORE": 0.667, "VSTORE:SPILL": 0.0},
        "spill_stores": 1,
        "spill_loads": 3,
        "vmem_bytes": 0x30,
    }
    assert (vector["name"], vector["hot_bundles"], vector["shares"]["XLU"]) == ("vector-only", 2, 0.75)
    assert [kernel["name"] for kernel in llo_report(tmp_path, kernels=False)] == ["copy.2", "late.1", "vector-only"]


PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized in function 'f'
ptxas info    : Compiling entry function 'flash_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for flash_mosaic_gpu_kernel
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Function properties for helper
    0 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 174 registers, used 2 barriers, 1 bytes smem
"""
PTX = """
wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%f1, %f2}, %rd1, %rd2, 1, 1, 1, 0, 1;
wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%f1, %f2}, {%r1, %r2, %r3, %r4}, %rd2, 1, 1, 1, 1;
cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r2}], [%r3];
cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%rd1, {%r2}], [%r3];
mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1}, {%r1}, {%r2}, {%f1};
"""
RESOURCES = (
    "Resources(smem_scratch_bytes=1000, tmem_scratch_cols=0, barrier_counts=Counter({Barrier(arrival_count=4, "
    "num_barriers=3, orders_tensor_core=False): 2, Barrier(arrival_count=1, num_barriers=1, "
    "orders_tensor_core=False): 1}), scoped_gmem_semaphores={})"
)


def test_the_assembler_s_report(tmp_path):
    for number in (10, 9):
        (tmp_path / f"kernel_{number}.ptxas").write_text(PTXAS.replace("flash", f"flash{number}"))
    (tmp_path / "kernel_9.ptx").write_text(PTX)
    (tmp_path / "kernel_9.resources.txt").write_text(RESOURCES)
    first, second = ptxas_report(tmp_path)
    warnings = first.pop("warnings")
    assert len(warnings) == 1 and "serialized" in warnings[0]
    assert first == {
        "name": "flash9",
        "arch": "sm_90a",
        "registers": 174,
        "stack": 16,
        "spill_stores": 12,
        "spill_loads": 12,
        "smem_bytes": 1000 + 8 * 7 + 1,
        "wgmma": 2,
        "wgmma_register_operand": 1,
        "tma_loads": 1,
        "tma_stores": 1,
        "cp_async": 0,
        "mma_sync": 1,
    }
    assert second["name"] == "flash10"
    (tmp_path / "kernel_9.ptxas").write_text("ptxas fatal : no")
    with pytest.raises(ValueError, match=r"kernel_9\.ptxas: not a report of ptxas"):
        ptxas_report(tmp_path)


@pytest.mark.cuda
def test_gpu_kernels_are_read(own_cases, absent_gpus):
    wrong, product = reports("h200", [f"{own_cases}:{name}" for name in ("WRONG", "GPU_PRODUCT")]).values()
    assert "(3, 3)" in wrong["error"]
    (kernel,) = product["kernels"]
    assert (kernel["name"], kernel["arch"]) == ("product", "sm_90a")
    assert (kernel["spill_stores"], kernel["wgmma_register_operand"], kernel["mma_sync"]) == (0, 0, 0)
    assert kernel["wgmma"] == 4, "a contraction of 64, 16 at a time"
    assert kernel["tma_loads"] >= 2 and kernel["tma_stores"] >= 1
    assert 2 * (64 * 64 + 2 * 64 * 128) <= kernel["smem_bytes"] < 2**16
    assert 64 < kernel["registers"] <= 255, "64 sums a thread, and no more than there are"


@pytest.mark.cuda
def test_xla_programs_compile_for_an_absent_gpu(absent_gpus):
    compiled = compile_for("h200", lambda x: x @ x, jax.ShapeDtypeStruct((512, 512), jnp.bfloat16))
    assert compiled.memory_analysis().argument_size_in_bytes == 2 * 512**2


def test_cases_have_names_of_their_own_and_known_families():
    for case in all_cases():
        assert set(case.families) <= set(TARGETS) and case.name.count("/") >= 1
        assert find(case.name).name == case.name
    with pytest.raises(KeyError, match="no case 'none/such'"):
        find("none/such")
