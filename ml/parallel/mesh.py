"""The device mesh: which devices there are, and along which axes they are arranged."""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from ml.errors import UserError


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Degrees of parallelism; at most one may be -1: whatever the other axes leave over.

    Attributes:
      data: replicas of the parameters, each with a part of the batch.
      fsdp: shards of parameters, gradients and optimizer state, each with a part of the batch (ZeRO-3).
      tensor: shards of heads, MLP width and vocabulary (Megatron-LM).
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = dataclasses.astuple(self)
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError(f"degrees {sizes} must be positive, and at most one of them -1")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges ``devices`` (default: all) in a mesh with explicit axes, so that sharding is part of every array's type.

    Raises:
      UserError: the degrees do not multiply to the number of devices.
    """
    count = len(jax.devices() if devices is None else devices)
    sizes = dataclasses.asdict(config)
    known = math.prod(size for size in sizes.values() if size != -1)
    free = count // known if -1 in sizes.values() else 1
    if known * free != count:
        asked = " x ".join(f"{name}={size}" for name, size in sizes.items())
        raise UserError(f"config.mesh: {asked} does not fit {count} devices; their product must be {count}")
    shape = tuple(free if size == -1 else size for size in sizes.values())
    return jax.make_mesh(shape, tuple(sizes), axis_types=(AxisType.Explicit,) * len(shape), devices=devices)
