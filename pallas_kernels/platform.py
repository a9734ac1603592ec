"""The platform and the chip that a program is traced for, which need not be this machine's.

A mesh knows its devices' platform and kind also where they are absent, as when a pod's program is compiled ahead of
time (`pallas_kernels.absent`).
"""

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
