"""Keeps compiled programs on the disk, so that a script that starts again need not compile them again."""

import hashlib
import os
import platform
from pathlib import Path


def keep_compiled_programs() -> None:
    """Turns on JAX's persistent compilation cache, in the user's cache folder or ``JAX_COMPILATION_CACHE_DIR``.

    Programs for CPUs are kept apart by the instructions that the machine has: a home folder may be many machines'.
    """
    import jax

    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(caches / "megabatch" / "xla" / _machine()))
    # Most programs of a small model compile in less than JAX's default of a second.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _machine() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return f"{platform.machine()}-{hashlib.sha256(''.join(names).encode()).hexdigest()[:12]}"
