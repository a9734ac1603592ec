"""Keeps compiled programs on the disk, so that a script that starts again need not compile them again."""

import os
from pathlib import Path


def keep_compiled_programs() -> None:
    """Turns on JAX's persistent compilation cache, in the user's cache folder or ``JAX_COMPILATION_CACHE_DIR``.

    Programs for CPUs are kept apart by the instructions that the machine has: a home folder may be many machines'.
    """
    import jax

    from pallas_kernels.platform import cpu_kind

    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(caches / "megabatch" / "xla" / cpu_kind()))
    # Most programs of a small model compile in less than JAX's default of a second.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
