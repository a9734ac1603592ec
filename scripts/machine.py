"""What benchmarks say of the machine they run on, and whether it is theirs alone."""

import os
import platform
import time
from importlib import metadata
from pathlib import Path

# Above this share of the machine's time taken by others, nothing is measured.
_BUSY = 0.10
_PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu", "numpy", "torch")


def cpu() -> str:
    """The processor's name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "an unknown CPU")


def device(kind: str) -> str:
    """The device in words, from JAX's ``device_kind``."""
    return f"{len(os.sched_getaffinity(0))} cores of {cpu()}" if kind == "cpu" else kind


def versions() -> dict[str, str]:
    """Of what was measured with."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def refuse(busy: float) -> None:
    """Raises `ml.errors.UserError` if others take too large a share of the machine's time."""
    from ml.errors import UserError

    if busy > _BUSY:
        raise UserError(
            f"others take {busy:.0%} of this machine's time: stop them, or give --allow_load to measure anyway"
        )


def busy_share(seconds: float = 3.0) -> float:
    """The share of the machine's time that others take."""

    def times() -> tuple[int, int]:
        fields = [int(x) for x in stat.read_text().split("\n", 1)[0].split()[1:9]]
        return sum(fields) - fields[3] - fields[4], sum(fields)

    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    busy, total = times()
    time.sleep(seconds)
    return (times()[0] - busy) / max(1, times()[1] - total)
