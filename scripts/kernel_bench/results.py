"""The report of a run: measured times against bounds, as JSON in docs/results and as lines on the terminal."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

from machine import device, versions

from kernel_bench.case import BenchCase
from pallas_kernels.chips import chip_of, peak_flops


def folder_of(device_kind: str) -> str:
    """The device's folder in docs/results."""
    return re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_")


def header(device_kind: str, ceilings: dict[str, Any]) -> dict[str, Any]:
    """What all cases of a run have in common."""
    return {
        "command": shlex.join(["python", "scripts/" + Path(sys.argv[0]).name, *sys.argv[1:]]),
        "device": device(device_kind),
        "versions": versions(),
        "ceilings": ceilings,
    }


def case_result(
    case: BenchCase, device_kind: str, ceilings: dict[str, Any], measured: dict[str, Any], **more: Any
) -> dict[str, Any]:
    """A case's bounds, and each program's time as a fraction of them (1: as fast as can be)."""
    chip = chip_of(device_kind)
    flops, moved = ceilings["matmul_flops_per_second"], ceilings["memory_bytes_per_second"]
    result: dict[str, Any] = {
        "name": case.name,
        "settings": dict(case.settings),
        "flops": case.cost.flops,
        "bytes": case.cost.bytes,
        "bound": case.cost.bound(flops, moved),
        "ceiling_seconds": case.bound(flops, moved),
    }
    peak = peak_flops(device_kind, case.dtype)
    if chip is not None and peak is not None:
        result["datasheet_seconds"] = case.bound(peak, chip.memory_bandwidth)
    programs = {}
    for name, times in measured.items():
        seconds = times["seconds"]
        programs[name] = times | {
            "flops_per_second": case.cost.flops / seconds,
            "bytes_per_second": case.cost.bytes / seconds,
            "of_ceiling": result["ceiling_seconds"] / seconds,
        }
        if "datasheet_seconds" in result:
            programs[name]["of_datasheet"] = result["datasheet_seconds"] / seconds
    impossible = [name for name, times in programs.items() if times.get("of_datasheet", 0) > 1.1]
    if impossible:
        more["faster_than_the_data_sheet"] = impossible
    return result | {"programs": programs} | more


def line(result: dict[str, Any]) -> str:
    """A case on the terminal: our time first, then each peer's as a multiple of ours."""
    if "error" in result:
        return f"{result['name']:<36} {result['error'][:120]}"
    (_, first), *others = result["programs"].items()
    bound = f"{first['of_ceiling']:.0%} of {result['bound']} ceiling"
    text = f"{result['name']:<36}{_time(first['seconds'])} {bound:<24}"
    ratios = [f"{name} {times['seconds'] / first['seconds']:.2f}x" for name, times in others]
    return text + ("  times ours: " + ", ".join(ratios) if ratios else "")


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:>9.3f} ms" if seconds > 1e-3 else f"{seconds * 1e6:>9.1f} us"
