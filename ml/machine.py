"""What a result says of the machine and the versions that it was made with."""

import os
import platform
from importlib import metadata
from pathlib import Path

_PACKAGES = (
    "megabatch",
    "jax",
    "jaxlib",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "libtpu",
    "flax",
    "optax",
    "numpy",
    "torch",
)


def cpu() -> str:
    """The processor's name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "an unknown CPU")


def device(kind: str) -> str:
    """The device in words, from JAX's ``device_kind``."""
    return f"{_cores()} cores of {cpu()}" if kind == "cpu" else kind


def versions() -> dict[str, str]:
    """Of what was measured with."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
