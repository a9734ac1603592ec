"""Compiles every kernel at real models' shapes for machines that are not here, and keeps what the compilers say."""

import shlex
import sys
from pathlib import Path
from typing import Any

import app
from absl import flags

_USAGE = """
Compiles the cases of all kernels (pallas_kernels/*/cases.py) for absent chips. TPU: the static schedule, units' shares
in the hot loop, spills, VMEM. H200: registers, spills, shared memory, wgmma and TMA instructions. Nothing is run.

  python scripts/kernel_schedule.py --chips=v5e,v6e,v5p
  python scripts/kernel_schedule.py --chips=h200      # in an environment that can compile for it: make env-cuda
"""


def define_flags() -> None:
    """Defines the script's flags."""
    flags.DEFINE_list("chips", ["v5e", "v6e", "v5p"], "what to compile for; h200 needs JAX's CUDA plugin")
    flags.DEFINE_string("cases", "", "only those whose name has this in it")
    flags.DEFINE_string("output", "docs/results", "folder; kernel_schedule_CHIP.json in it is written")


def main() -> None:
    """Compiles for one chip after the other; prints a line for each kernel, writes JSON."""
    from ml.errors import UserError, nearest

    args = flags.FLAGS
    import jax

    jax.config.update("jax_platforms", "cpu")
    from machine import versions
    from result_file import write

    from pallas_kernels.absent import TARGETS, reports
    from pallas_kernels.cases import all_cases

    for family in args.chips:
        if family not in TARGETS:
            raise UserError(f"--chips={family}: no such chip; {nearest(family, TARGETS)}")
    failed = []
    for family in args.chips:
        names = [case.name for case in all_cases() if family in case.families and args.cases in case.name]
        if not names:
            raise UserError(f"--cases={args.cases}: no case has this in its name")
        results = reports(family, names)
        for name in names:
            for text in lines(name, results[name]):
                print(f"{family:<5} {text}", flush=True)
        path = Path(args.output) / f"kernel_schedule_{family}.json"
        document = {
            "command": shlex.join(["python", "scripts/kernel_schedule.py", *sys.argv[1:]]),
            "device": TARGETS[family].device_kind,
            "versions": versions(),
            "cases": results,
        }
        write(path, document)
        print(f"written to {path}")
        failed += [f"{family}: {name}" for name in names if "error" in results[name]]
    if failed:
        raise UserError(f"did not compile: {', '.join(failed)}")


def lines(name: str, result: dict[str, Any]) -> list[str]:
    """What to print of a case: a line for each kernel."""
    if "error" in result:
        return [f"{name}: {result['error'][:300]}"]
    if not result["kernels"]:
        return [f"{name}: no Pallas kernel in it"]
    return [f"{name}: {kernel['name']}: {_figures(kernel)}" for kernel in result["kernels"]]


def _figures(kernel: dict[str, Any]) -> str:
    if "bundles" in kernel:
        busiest = sorted(kernel["shares"].items(), key=lambda share: -share[1])[:3]
        shares = ", ".join(f"{unit} {share:.2f}" for unit, share in busiest)
        text = f"{kernel['bundles']} bundles, {kernel['hot_bundles']} hot ({shares}), {kernel['spill_stores']} spills"
        return text + f", {kernel['vmem_bytes'] / 2**20:.1f} MiB of VMEM"
    text = f"{kernel['registers']} registers, {kernel['spill_stores']} bytes spilled, "
    text += f"{kernel['smem_bytes'] / 1024:.0f} KiB of shared memory, "
    text += f"{kernel['wgmma']} wgmma, {kernel['tma_loads']} TMA loads"
    return text + "".join(f"; {warning}" for warning in kernel["warnings"])


if __name__ == "__main__":
    define_flags()
    app.run(main, usage=_USAGE)
