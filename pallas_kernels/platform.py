"""The platform that a program is traced for, which need not be this machine's."""

import jax


def platform() -> str:
    """``cpu``, ``gpu`` or ``tpu``: of the mesh in use (`jax.set_mesh`), or else of JAX's default devices.

    A mesh knows its devices' platform also where they are absent, as when a pod's program is compiled ahead of time.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None or device.platform is None else device.platform
    return {"cuda": "gpu", "rocm": "gpu"}.get(name, name)
