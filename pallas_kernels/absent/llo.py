"""Reads the static schedule of TPU kernels, from the folder that libtpu's ``--xla_jf_dump_to`` names.

A bundle is what a core issues at once, about one a cycle. The schedule knows nothing of waiting for memory, so a rate
that follows from it is an upper bound.
"""

import pathlib
import re
from typing import Any

import numpy as np

# What makes libtpu write it; read once, when libtpu is loaded.
FLAGS = "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_emit_annotations=true"

_SCHEDULE = re.compile(r"\d+-(?P<name>.+)-\d+-final_hlo-static-per-bundle-utilization\.txt")
# Bundles without a matrix operation that do not yet end a loop around such operations.
_GAP = 64


def llo_report(folder: pathlib.Path, kernels: bool = True) -> list[dict[str, Any]]:
    """One mapping for each kernel in the folder, in the order in which they were compiled.

    Args:
      folder: what libtpu wrote to, for one program.
      kernels: Pallas kernels alone; else XLA's fusions too.

    Returns:
      ``name``; ``bundles`` (all of the kernel) and ``hot_bundles`` (of the longest stretch of matrix operations, or all
      if there are none); ``shares``: the mean use of each unit in the hot stretch, of its slots in a bundle;
      ``spill_stores`` and ``spill_loads`` (vector registers, instructions in the whole kernel); ``vmem_bytes`` (windows
      that Pallas buffers, scratch and spills; not operands that XLA keeps there).
    """
    found = []
    for path in sorted(folder.iterdir()):
        match = _SCHEDULE.fullmatch(path.name)
        if match and (not kernels or _is_kernel(folder, match.group("name"))):
            found.append({"name": match.group("name"), **_schedule(path), "vmem_bytes": _vmem(path, folder)})
    return found


def _is_kernel(folder: pathlib.Path, name: str) -> bool:
    if name == "TLP" or name.startswith("<"):  # the program around its kernels
        return False
    return any("tpu_custom_call" in path.read_text() for path in _of(folder, name, "schedule-analysis_final_bundles"))


def _of(folder: pathlib.Path, name: str, stage: str) -> list[pathlib.Path]:
    pattern = re.compile(rf"\d+-{re.escape(name)}-\d+-{stage}\.txt")
    return sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))


def _schedule(path: pathlib.Path) -> dict[str, Any]:
    lines = path.read_text().splitlines()
    begin = lines.index("== UTILIZATION:")
    units = [unit.strip() for unit in lines[1].split(",")]
    slots = np.array([int(n) for n in lines[2].split()])
    use = np.array([[int(n) for n in line.split()] for line in lines[begin + 1 :] if re.match(r"\s*\d", line)])
    if use.shape[1] != len(units) or len(slots) != len(units):
        raise ValueError(f"{path}: {len(units)} units, {len(slots)} numbers of slots, {use.shape[1]} columns")
    hot = _hot(use[:, units.index("MXU" if "MXU" in units else "MATMUL")])
    shares = use[hot].mean(axis=0) / slots
    return {
        "bundles": len(use),
        "hot_bundles": len(use[hot]),
        "shares": {unit: round(float(share), 3) for unit, share in zip(units, shares, strict=True)},
        "spill_stores": int(use[:, units.index("VSTORE:SPILL")].sum()),
        "spill_loads": int(use[:, units.index("VLOAD:FILL")].sum()),
    }


def _hot(matrix: np.ndarray) -> slice:
    """The stretch with the most matrix operations; of several with about as many (masked and not) the densest."""
    busy = np.flatnonzero(matrix)
    if not len(busy):
        return slice(None)
    stretches = np.split(busy, np.flatnonzero(np.diff(busy) > _GAP) + 1)
    most = max(matrix[stretch].sum() for stretch in stretches)
    stretches = [stretch for stretch in stretches if matrix[stretch].sum() > 0.9 * most]
    best = max(stretches, key=lambda stretch: matrix[stretch].sum() / (stretch[-1] - stretch[0] + 1))
    return slice(int(best[0]), int(best[-1]) + 1)


def _vmem(path: pathlib.Path, folder: pathlib.Path) -> int:
    match = _SCHEDULE.fullmatch(path.name)
    assert match
    ends = [0]
    for text in _of(folder, match.group("name"), "post-delay-converter"):
        if text.name.split("-")[0] == path.name.split("-")[0]:
            allocations = re.findall(
                r"space=vmem, size = (0x[0-9a-f]+|\d+), offset = (0x[0-9a-f]+|\d+)", text.read_text()
            )
            ends += [int(size, 0) + int(offset, 0) for size, offset in allocations]
    return max(ends)
