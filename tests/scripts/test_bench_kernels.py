"""`scripts/bench_kernels.py` and its cases: what is reported, that programs agree, and that no work is left out."""

import importlib
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from script_processes import error_of, run

from pallas_kernels.absent import compile_for
from pallas_kernels.roofline import Cost


@pytest.fixture(scope="module")
def bench(pytestconfig):
    """The script as a module; `kernel_bench` can be imported after it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(pytestconfig.rootpath / "scripts")
        yield importlib.import_module("bench_kernels")


def cases_of(kernel, platform, cache_bytes=2**20):
    return list(importlib.import_module(f"kernel_bench.{kernel}").cases(platform, cache_bytes))


# Imported by other scripts, absent on a machine that has JAX and little else.
_ABSENT = (
    "ml_collections",
    "matplotlib",
    "pyarrow",
    "tensorboardX",
    "orbax",
    "grain",
    "optax",
    "torch",
    "transformers",
)


@pytest.mark.slow
def test_a_run_on_a_machine_with_little_more_than_jax(tmp_path):
    blocked = tmp_path / "sitecustomize.py"
    blocked.write_text(f"import sys\nfor name in {_ABSENT}:\n    sys.modules[name] = None\n")
    # The server that other tests start scripts with has imported much already.
    command = [sys.executable, "scripts/bench_kernels.py", "--kernel=paged", "--cases=decode_1x256,decode_4x256"]
    command += ["--rounds=2", "--peers", f"--output={tmp_path}"]
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    environment = os.environ | {"PYTHONPATH": path, "XLA_FLAGS": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "cpu/bench_paged.json").read_text())
    assert document["command"] == "python " + " ".join(command[1:])
    assert document["versions"]["jax"] == jax.__version__ and " of " in document["device"]
    memory, product = (document["ceilings"][f"{x}_per_second"] for x in ("memory_bytes", "matmul_flops"))
    first, second = document["cases"]
    assert (first["name"], second["name"]) == ("decode_1x256", "decode_4x256")
    assert second["bytes"] == 4 * (256 * 2 * 8 * 64 + 2 * 8 * 64) * 4 and second["flops"] == 4 * 4 * 256 * 8 * 64
    assert second["ceiling_seconds"] == max(second["bytes"] / memory, second["flops"] / product)
    assert set(second["programs"]) >= {"ours/xla", "ours/invariant", "dense"}
    for name, times in second["programs"].items():
        assert times["of_ceiling"] == pytest.approx(second["ceiling_seconds"] / times["seconds"])
        assert second["difference_from_first"][name] < 1e-5
    assert re.search(r"decode_4x256 .* of (memory|compute) ceiling .*dense \d+\.\d\dx", done.stdout)


@pytest.mark.parametrize("kernel", ["flash", "paged", "shared_prefix"])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_cases_have_names_of_their_own_and_cost_something(bench, kernel, platform):
    cases = cases_of(kernel, platform, 50 * 2**20)
    assert len({case.name for case in cases}) == len(cases) > 3
    for case in cases:
        assert case.cost.flops > 0 and case.cost.bytes > 0
        assert case.bound(1e12, 1e12) >= case.cost.seconds(1e12, 1e12) * (1 - 1e-12)
        json.dumps(dict(case.settings))


@pytest.mark.sweep("paged-decode_16_skewed")
@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ("flash", "small_512/forward"),
        pytest.param("shared_prefix", "4_below_256", marks=pytest.mark.slow),
        pytest.param("shared_prefix", "64_below_1k_and_16_below_256", marks=pytest.mark.slow),
        ("paged", "decode_16_skewed"),
    ],
)
def test_programs_of_a_case_agree(bench, kernel, name, tmp_path, monkeypatch):
    monkeypatch.setenv("MEGABATCH_CACHE_DIR", str(tmp_path))
    (case,) = [case for case in cases_of(kernel, "cpu") if case.name == name]
    built = case.build(True)
    failed = dict(built.failed)
    differences = bench._differences(built, failed)
    assert not failed and len(differences) == len([p for p in built.programs if p.name in built.outputs])
    assert max(differences.values()) < 1e-5, differences


def test_every_call_is_made(bench, monkeypatch):
    """No call's work is shared with another's, left out, or reduced to the part of its result that is looked at."""
    from kernel_bench.timing import Program, Timer

    calls = []

    def work(x, y):
        jax.debug.callback(lambda s: calls.append(float(s)), x[0, 0])
        return x @ y

    arrays = [(jnp.full((8, 8), i, jnp.float32), jnp.ones((8, 8))) for i in range(3)]
    timer = Timer(Program("work", work, arrays), turn_seconds=0.0)
    jax.effects_barrier()
    calls.clear()
    timer.turn()
    jax.effects_barrier()
    assert sorted(calls) == [0.0, 1.0, 2.0]


def test_turns_are_taken_round_by_round(bench):
    from kernel_bench.timing import interleaved

    class Fake:
        def __init__(self, name, times):
            self.name, self.times = name, iter(times)

        def turn(self):
            order.append(self.name)
            return next(self.times)

    order = []
    results = interleaved([Fake("a", [3.0, 1.0, 2.0]), Fake("b", [5.0, 5.0, 8.0])], 3)
    assert order == ["a", "b"] * 3
    assert (results["a"]["seconds"], results["b"]["seconds"]) == (2.0, 5.0)


def test_parts_that_must_follow_one_another_have_bounds_that_add_up(bench):
    from kernel_bench.case import BenchCase, rotations

    compute, memory = Cost(100.0, 1.0), Cost(1.0, 100.0)
    whole = BenchCase("x", {}, compute + memory, "bfloat16", lambda peers: None)
    assert whole.bound(1.0, 1.0) == 101
    in_turn = BenchCase("x", {}, compute + memory, "bfloat16", lambda peers: None, (compute, memory))
    assert in_turn.bound(1.0, 1.0) == 200
    assert rotations(10.0, 50.0) == 11 and rotations(1000.0, 50.0) == 1 and rotations(0.001, 50.0) == 16


def test_a_program_that_fails_costs_no_other(bench):
    from kernel_bench.case import BenchCase, Built
    from kernel_bench.timing import Program

    def fails(x):
        raise NotImplementedError("no such kernel")

    sets = [(jnp.ones((8, 8)),)]
    built = Built([Program("ours/gpu", fails, sets), Program("ours/xla", lambda x: x, sets)], {}, {"peer": "absent"})
    ceilings = {"memory_bytes_per_second": 1.0, "matmul_flops_per_second": 1.0}
    options = ("cpu", "cpu", ceilings, True, 2)
    result = bench.run(BenchCase("x", {}, Cost(1.0, 1.0), "float32", lambda peers: built), *options)
    assert set(result["programs"]) == {"ours/xla"}
    assert result["failed"] == {"peer": "absent", "ours/gpu": "NotImplementedError: no such kernel"}
    wrong = bench.run(BenchCase("x", {}, Cost(1.0, 1.0), "float32", fails), *options)
    assert wrong["error"] == "NotImplementedError: no such kernel"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "error: --kernel is missing; choose flash, paged"),
        (
            ("--kernel=paged", "--cases=decode_1x25"),
            "error: --cases=decode_1x25: no such case; did you mean 'decode_1x25",
        ),
    ],
)
def test_mistakes(tmp_path, arguments, message):
    assert error_of(run("bench_kernels.py", *arguments, f"--output={tmp_path}")).startswith(message)
    assert not any(tmp_path.iterdir())


@pytest.mark.parity
def test_torch_computes_the_same(bench):
    for kernel, name in (("paged", "decode_4x256"), ("flash", "small_512/forward")):
        (case,) = [case for case in cases_of(kernel, "cpu") if case.name == name]
        failed: dict[str, str] = {}
        differences = bench._differences(case.build(True), failed)
        assert not failed and differences["torch/sdpa"] < 1e-5


@pytest.mark.cuda
def test_the_hazard_s_product_keeps_its_left_operand_in_registers(bench, tmp_path, monkeypatch, absent_gpus):
    from kernel_bench import hazard

    from pallas_kernels.absent import ptxas_report

    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    compile_for("h200", hazard.product, *hazard.operands(0))
    (kernel,) = ptxas_report(tmp_path)
    assert kernel["wgmma"] == kernel["wgmma_register_operand"] == 4 and kernel["spill_stores"] == 0


@pytest.mark.cuda
@pytest.mark.parametrize(
    "kernel", ["flash", *(pytest.param(k, marks=pytest.mark.slow) for k in ("paged", "shared_prefix"))]
)
def test_what_is_measured_on_a_gpu_compiles_for_one(bench, kernel, absent_gpus):
    """The programs of ours at small sizes, all but those that a peer's library or a device must be there for."""
    module = importlib.import_module(f"kernel_bench.{kernel}")
    if kernel == "flash":
        built = module._build((1, 256, 4, 2, 128), {"segments": [128, 128]}, True, "bfloat16", "gpu", 2, False)
    elif kernel == "paged":
        shape = module.Shape((256, 70), (1, 64), heads=4, kv_heads=2, cache_dtype="int8")
        built = module._build(shape, "gpu", 2, False)
    else:
        shape = module.Shape((256,) * 4, heads=4, kv_heads=2)
        built = module._build(module.Batch(4, 128, 128), shape, "gpu", False)
    compiled = set()
    for program in built.programs:
        compile_for("h200", program.function, *program.sets[0])
        compiled.add(program.name)
    assert len(compiled) >= 2
    if kernel == "shared_prefix":
        assert "is interpreted on cpu" in built.failed.pop("ours/by_crossover")
    assert not built.failed


@pytest.mark.gpu
def test_the_assembler_gets_register_operands_right(bench):
    from kernel_bench import hazard

    assert hazard.wrong_elements(trials=3) == 0


def test_what_the_hazard_is_held_against(bench):
    from kernel_bench import hazard

    left, right = hazard.operands(1)
    total = sum((np.asarray(left[s], np.float32) + s) @ np.asarray(right[s], np.float32) for s in range(len(left)))
    assert (hazard.expected(left, right) == total).all() and np.abs(total).max() < 2**24
    assert np.abs(np.asarray(left, np.float32)).max() + len(left) <= 256, "exact in bfloat16"
