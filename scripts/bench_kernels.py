"""Measures the attention kernels against their rooflines and against other implementations, taking turns."""

import importlib
import time
from pathlib import Path
from typing import Any

import app
import result_file
from absl import flags

_USAGE = """
Times a kernel at real shapes: fraction of what the device could do, and peers interleaved. Writes JSON after each case.

  python scripts/bench_kernels.py --kernel=paged --peers
  python scripts/bench_kernels.py --kernel=flash --cases=llama3_8b_8k/forward --output=results
"""

KERNELS = ("flash", "paged", "shared_prefix")
# Without a data sheet: what a case rotates past.
_CACHE_BYTES = 2**25


def define_flags() -> None:
    """Defines the script's flags."""
    flags.DEFINE_enum("kernel", None, [*KERNELS, "ceilings", "hazard"], "what to measure")
    flags.DEFINE_boolean("peers", False, "also other implementations: cuDNN, PyTorch (if it is installed), XLA")
    flags.DEFINE_list("cases", [], "which of the kernel's cases; all by default")
    flags.DEFINE_integer("rounds", 7, "turns of each program", lower_bound=1)
    flags.DEFINE_float("budget", None, "seconds after which no further case is begun")
    flags.DEFINE_integer("threads", 2, "CPU threads of each side, and cores that the process keeps to", lower_bound=1)
    flags.DEFINE_string("output", "docs/results", "folder of results; the device's own folder in it is written to")


def main() -> None:
    """Runs the cases, prints a line for each, writes JSON."""
    from ml.errors import UserError, nearest

    args = flags.FLAGS
    if args.kernel is None:
        raise UserError(f"--kernel is missing; choose {', '.join((*KERNELS, 'ceilings', 'hazard'))}")
    _keep_to(args.threads)

    import jax
    from kernel_bench import ceilings, results

    begin = time.monotonic()
    device = jax.devices()[0]
    platform = {"cuda": "gpu", "rocm": "gpu"}.get(device.platform, device.platform)
    if args.kernel == "hazard":
        _hazard(platform, Path(args.output))
        return
    chosen = []
    if args.kernel != "ceilings":
        available = {case.name: case for case in _cases(args.kernel, platform, device.device_kind)}
        for name in args.cases or available:
            if name not in available:
                raise UserError(f"--cases={name}: no such case; {nearest(name, available)}")
            chosen.append(available[name])
    document = results.header(device.device_kind, ceilings.measure(platform)) | {"kernel": args.kernel, "cases": []}
    path = Path(args.output) / results.folder_of(device.device_kind) / f"bench_{args.kernel}.json"
    measured = document["ceilings"]
    moved, product = measured["memory_bytes_per_second"] / 1e9, measured["matmul_flops_per_second"] / 1e12
    print(f"{document['device']}: memory {moved:.1f} GB/s ({measured['memory']})")
    print(f"product {product:.3f} TFLOP/s ({measured['matmul']})", flush=True)
    skipped = []
    for case in chosen:
        if args.budget is not None and time.monotonic() - begin > args.budget:
            skipped.append(case.name)
            continue
        document["cases"].append(run(case, platform, device.device_kind, measured, args.peers, args.rounds))
        print(results.line(document["cases"][-1]), flush=True)
        result_file.write(path, document)
    if skipped:
        document["not_measured_for_want_of_time"] = skipped
        print(f"not measured for want of time: {', '.join(skipped)}")
    result_file.write(path, document)
    print(f"written to {path}")
    failed = [case["name"] for case in document["cases"] if "error" in case]
    if failed:
        raise UserError(f"failed: {', '.join(failed)}; see {path}")


def run(case: Any, platform: str, device_kind: str, ceilings: dict, peers: bool, rounds: int) -> dict[str, Any]:
    """Measures one case; what fails is reported and costs nothing else."""
    from kernel_bench import results
    from kernel_bench.timing import TURN_SECONDS, Timer, interleaved

    try:
        built = case.build(peers)
    except Exception as error:
        return {"name": case.name, "settings": dict(case.settings), "error": _reason(error)}
    failed, timers = dict(built.failed), []
    for program in built.programs:
        try:
            timers.append(Timer(program, TURN_SECONDS[platform]))
        except Exception as error:
            failed[program.name] = _reason(error)
    differences = _differences(built, failed)
    if not timers:
        return {"name": case.name, "settings": dict(case.settings), "error": "; ".join(failed.values())}
    extra: dict[str, Any] = {"difference_from_first": differences}
    if failed:
        extra["failed"] = failed
    return results.case_result(case, device_kind, ceilings, interleaved(timers, rounds), **extra)


def _differences(built: Any, failed: dict[str, str]) -> dict[str, float]:
    """Largest difference of each program's result from the first's, in units of the largest element."""
    import jax
    import numpy as np

    def result(program: Any) -> Any:
        function = jax.jit(program.function) if program.framework == "jax" else program.function
        out = built.outputs[program.name](function(*program.sets[0]))
        if program.framework == "torch":
            out = out.detach().float().cpu().numpy()
        return np.asarray(out, np.float32)

    compared = [p for p in built.programs if p.name in built.outputs and p.name not in failed]
    first, found = None, {}
    for program in compared:
        try:
            out = result(program)
        except Exception as error:
            failed[program.name] = _reason(error)
            continue
        first = out if first is None else first
        found[program.name] = float(np.abs(out - first).max() / np.abs(first).max())
    return found


def _cases(kernel: str, platform: str, device_kind: str) -> Any:
    from pallas_kernels.chips import chip_of

    chip = chip_of(device_kind)
    cache_bytes = chip.l2_bytes if chip is not None else _CACHE_BYTES
    return importlib.import_module(f"kernel_bench.{kernel}").cases(platform, cache_bytes)


def _hazard(platform: str, output: Path) -> None:
    """Says which assemblers there are, and whether the one that JAX uses gets register operands right."""
    import jax
    from kernel_bench import hazard, results
    from machine import versions

    from ml.errors import UserError

    found = hazard.assemblers()
    print("assemblers:", ", ".join(f"{path} {version}" for path, version in found.items()) or "none found")
    if platform != "gpu":
        raise UserError("--kernel=hazard: needs an NVIDIA GPU of the Hopper generation")
    wrong = hazard.wrong_elements()
    kind = jax.devices()[0].device_kind
    document = {"versions": versions(), "device": kind, "ptxas": found, "wrong_elements": wrong}
    path = output / results.folder_of(kind) / "ptxas_hazard.json"
    result_file.write(path, document)
    print(f"wrong elements: {wrong}; written to {path}")
    if wrong:
        raise UserError(
            "products with a left operand in registers are wrong with this ptxas; install nvidia-cuda-nvcc 13.3 or "
            "later and set XLA_FLAGS=--xla_gpu_cuda_data_dir=.../nvidia/cu13"
        )


def _keep_to(threads: int) -> None:
    """Keeps a CPU run to so many cores, and PyTorch's threads from spinning while JAX works; before both are loaded."""
    import os

    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("KMP_BLOCKTIME", "0")
    # PyTorch needs some of the GPU's memory too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if os.environ.get("JAX_PLATFORMS", "") == "cpu":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


if __name__ == "__main__":
    define_flags()
    app.run(main, usage=_USAGE)
