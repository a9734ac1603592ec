"""The platform and the chip that a program is traced for, which need not be this machine's.

A mesh knows its devices' platform and kind also where they are absent, as when a pod's program is compiled ahead of
time (`pallas_kernels.absent`). And where this machine keeps what was found out about it.
"""

import functools
import hashlib
import os
import pathlib
import platform as machine

import jax


def platform() -> str:
    """``cpu``, ``gpu`` or ``tpu``: of the mesh in use (`jax.set_mesh`), or else of JAX's default devices."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None or device.platform is None else device.platform
    return {"cuda": "gpu", "rocm": "gpu"}.get(name, name)


def chip() -> str | None:
    """The device kind, key of `pallas_kernels.chips.CHIPS`: of the mesh in use, or else of JAX's default devices.

    ``None``: the mesh in use does not know it.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.local_devices()[0].device_kind if device is None else device.device_kind


def cache_folder() -> pathlib.Path:
    """Of what was measured or compiled for this machine: ``$MEGABATCH_CACHE_DIR``, or else ``~/.cache/megabatch``."""
    folder = os.environ.get("MEGABATCH_CACHE_DIR")
    return pathlib.Path(folder) if folder else pathlib.Path.home() / ".cache" / "megabatch"


@functools.cache
def cpu_kind() -> str:
    """A name for this machine's CPU: what is compiled for it may not run on another that has the same home folder."""
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    telling = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    return f"{machine.machine()}-{hashlib.sha256(''.join(telling).encode()).hexdigest()[:12]}"
