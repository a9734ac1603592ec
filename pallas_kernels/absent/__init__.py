"""Compiling for accelerators that are not here, and reading what their compilers say of the kernels.

TPUs are compiled for by libtpu; an NVIDIA H200 by JAX's CUDA plugin with NVIDIA's assembler
(``pip install jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt``). Neither needs a
device. Set ``JAX_PLATFORMS=cpu``, or JAX takes hold of what this machine has. Programs compiled for absent devices can
be written to JAX's compilation cache, but not read again: turn it off.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

from pallas_kernels.absent.llo import llo_report
from pallas_kernels.absent.ptxas import ptxas_report
from pallas_kernels.absent.reports import reports
from pallas_kernels.chips import CHIPS


@dataclasses.dataclass(frozen=True)
class Target:
    """A family of devices to compile for.

    Attributes:
      device_kind: key of `pallas_kernels.chips.CHIPS`.
      platform: ``tpu`` or ``gpu``, as `pallas_kernels.platform.platform`.
      smallest: the smallest shape that its compiler describes.
    """

    device_kind: str
    platform: str
    smallest: tuple[int, ...]


TARGETS = {
    "v5e": Target("TPU v5 lite", "tpu", (2, 2)),
    "v5p": Target("TPU v5", "tpu", (2, 2, 1)),
    "v6e": Target("TPU v6 lite", "tpu", (2, 2)),
    "h200": Target("NVIDIA H200", "gpu", (1, 1)),
}

_H200_DESCRIPTION = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 149250000000
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 patch: 0 }
runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA H200"
"""

# The TPU's compiler is to look neither for the machine that it runs on nor for another process that has loaded it.
_COMPILER_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_HOST_BOUNDS": "1,1,1",
}


class CompilerMissing(RuntimeError):
    """No compiler for these devices is installed, or it cannot describe them."""


def devices(family: str, shape: Sequence[int] | None = None, slices: int = 1) -> list[Any]:
    """Devices described by their compiler; none of them is touched.

    Args:
      family: key of `TARGETS`.
      shape: TPU: chips along each axis of a slice; GPU: nodes, and devices in each. ``None``: the smallest.
      slices: groups of them, joined by a network.

    Raises:
      CompilerMissing: with what the compiler said.
    """
    from jax.experimental import topologies

    target = TARGETS[family]
    shape = target.smallest if shape is None else tuple(shape)
    for variable, value in _COMPILER_ALONE.items():
        os.environ.setdefault(variable, value)
    request: dict[str, Any]
    if target.platform == "tpu":
        request = {"platform": "tpu", "topology_name": f"{family}:{'x'.join(map(str, shape))}"}
        request |= {} if slices == 1 else {"num_slices": slices}
    else:
        request = {"platform": "cuda", "topology_name": family, "topology": " x ".join(map(str, (slices, *shape)))}
        request["target_config"] = _H200_DESCRIPTION
    try:
        return list(topologies.get_topology_desc(**request).devices)
    except Exception as error:  # whatever the plugin that is missing or too old makes of it
        raise CompilerMissing(" ".join(str(error).split())[:300]) from error


@contextlib.contextmanager
def tracing_for(family: str) -> Iterator[None]:
    """What is traced meanwhile is for one device of the family: Pallas and `pallas_kernels.platform` see it so."""
    target = TARGETS[family]
    device = AbstractDevice(target.device_kind, CHIPS[target.device_kind].cores, target.platform)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        yield


def compile_for(family: str, function: Callable[..., Any], *arguments: Any) -> jax.stages.Compiled:
    """Compiles a function for one device that need not be here.

    Args:
      family: key of `TARGETS`.
      function: of arrays.
      *arguments: pytrees of arrays or `jax.ShapeDtypeStruct`.

    Raises:
      CompilerMissing: there is no compiler for it.
    """
    sharding = SingleDeviceSharding(devices(family)[0])
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
    platform = {"gpu": "cuda"}.get(TARGETS[family].platform, TARGETS[family].platform)
    with tracing_for(family):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).compile()


__all__ = [
    "TARGETS",
    "CompilerMissing",
    "Target",
    "compile_for",
    "devices",
    "llo_report",
    "ptxas_report",
    "reports",
    "tracing_for",
]
