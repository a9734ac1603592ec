"""Reads what NVIDIA's assembler says of Mosaic GPU kernels, from the folder that ``MOSAIC_GPU_DUMP_TO`` names."""

import pathlib
import re
from collections import Counter
from typing import Any

_INSTRUCTIONS = {
    "wgmma": r"\bwgmma\.mma_async\b",
    # A left operand in registers: four of them instead of a shared-memory descriptor.
    "wgmma_register_operand": r"\bwgmma\.mma_async\.[^;]*?\},\s*\{",
    "tma_loads": r"\bcp\.async\.bulk\.tensor\S*\.shared::c\w+\.global\b",
    "tma_stores": r"\bcp\.async\.bulk\.tensor\S*\.global\.shared::c\w+\b",
    "cp_async": r"\bcp\.async\.c[ag]\b",
    "mma_sync": r"\bmma\.sync\b",
}


def ptxas_report(folder: pathlib.Path) -> list[dict[str, Any]]:
    """One mapping for each kernel, in the order in which they were compiled.

    Returns:
      ``name``, ``arch``; ``registers`` (a thread), ``spill_stores``, ``spill_loads`` and ``stack`` (bytes a thread,
      over all functions); ``smem_bytes`` (a block, barriers included); numbers of instructions in the PTX: ``wgmma``,
      ``wgmma_register_operand``, ``tma_loads``, ``tma_stores``, ``cp_async``, ``mma_sync``; ``warnings``: the lines in
      which the assembler complains, such as that wgmma was serialized.
    """
    paths = folder.glob("*.ptxas")
    return [_kernel(path) for path in sorted(paths, key=lambda path: (len(path.stem), path.stem))]


def _kernel(path: pathlib.Path) -> dict[str, Any]:
    text = path.read_text()
    entry = re.search(r"Compiling entry function '(\S+?)' for '(\S+?)'", text)
    used = re.search(r"Used (\d+) registers", text)
    if entry is None or used is None:
        raise ValueError(f"{path}: not a report of ptxas: {text[:200]!r}")
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
    stack, stores, loads = (sum(map(int, column)) for column in zip(*frames, strict=True))
    static = re.search(r"(\d+) bytes smem", text)
    name = entry.group(1)
    for suffix in ("_kernel", "_mosaic_gpu"):
        name = name.removesuffix(suffix)
    return {
        "name": name,
        "arch": entry.group(2),
        "registers": int(used.group(1)),
        "spill_stores": stores,
        "spill_loads": loads,
        "stack": stack,
        "smem_bytes": _dynamic(path.with_suffix(".resources.txt")) + (int(static.group(1)) if static else 0),
        **_instructions(path.with_suffix(".ptx")),
        "warnings": [
            line for line in text.splitlines() if re.search(r"warning|Potential Performance Loss|error", line)
        ],
    }


def _dynamic(path: pathlib.Path) -> int:
    """Shared memory that is asked for at launch: scratch, and 8 bytes for each barrier."""
    if not path.exists():
        return 0
    text = path.read_text()
    scratch = re.search(r"smem_scratch_bytes=(\d+)", text)
    barriers = re.findall(r"num_barriers=(\d+)[^)]*\): (\d+)", text)
    return (int(scratch.group(1)) if scratch else 0) + 8 * sum(int(size) * int(count) for size, count in barriers)


def _instructions(path: pathlib.Path) -> Counter:
    if not path.exists():
        return Counter()
    text = path.read_text()
    return Counter({name: len(re.findall(pattern, text)) for name, pattern in _INSTRUCTIONS.items()})
