"""What Google Cloud calls its TPU generations, and how many hosts a topology has."""

import dataclasses
import math

from ml.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class TpuType:
    """A generation.

    Attributes:
      cloud: prefix of Cloud TPU's accelerator type.
      cores: that Cloud TPU counts for each chip in the accelerator type.
      runtime: software version of its virtual machines; empty: not offered outside of GKE.
      gke: GKE's name.
      dimensions: of a topology.
      chips_per_host: in a slice of several hosts.
      largest_host: most chips of a single host.
    """

    cloud: str
    cores: int
    runtime: str
    gke: str
    dimensions: int
    chips_per_host: int = 4
    largest_host: int = 4


TPU_TYPES = {
    "v4": TpuType("v4", 2, "tpu-ubuntu2204-base", "tpu-v4-podslice", 3),
    "v5e": TpuType("v5litepod", 1, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", 2, largest_host=8),
    "v5p": TpuType("v5p", 2, "v2-alpha-tpuv5", "tpu-v5p-slice", 3),
    "v6e": TpuType("v6e", 1, "v2-alpha-tpuv6e", "tpu-v6e-slice", 2, largest_host=8),
    "tpu7x": TpuType("tpu7x", 2, "", "tpu7x", 3),
}


def tpu_type(name: str) -> TpuType:
    """The generation of this name.

    Raises:
      UserError: there is none.
    """
    if name not in TPU_TYPES:
        raise UserError(f"--tpu={name}: no such TPU; {nearest(name, TPU_TYPES)} (known: {', '.join(TPU_TYPES)})")
    return TPU_TYPES[name]


def chips(topology: str, of: TpuType) -> int:
    """Chips of a slice, ``4x8`` or ``2x2x4``.

    Raises:
      UserError: it is not written like that, or has another number of dimensions than the generation.
    """
    sizes = topology.split("x")
    example = "x".join("2" * (of.dimensions - 1) + "4")
    if len(sizes) != of.dimensions or not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise UserError(f"--topology={topology} must have {of.dimensions} dimensions for {of.gke}, such as {example}")
    return math.prod(map(int, sizes))


def hosts(topology: str, of: TpuType) -> int:
    """Machines of a slice.

    Raises:
      UserError: as `chips`, or the chips do not fill whole machines.
    """
    count = chips(topology, of)
    if count <= of.largest_host:
        return 1
    if count % of.chips_per_host:
        raise UserError(f"--topology={topology}: {count} chips do not fill machines of {of.chips_per_host}")
    return count // of.chips_per_host
