"""The device mesh: which devices there are, and along which axes they are arranged."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from ml.errors import UserError

# From the slowest links to the fastest: neighbours along the last axis are neighbours in the machine. A stage sends one
# activation per microbatch to the next, replicas meet once a step or a layer, tensor parallelism twice in every block.
AXES = ("stage", "data", "fsdp", "expert", "sequence", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Degrees of parallelism, of which at most one may be -1: whatever the other axes leave over; and the layout.

    Attributes:
      data: replicas, each with a part of the batch.
      fsdp: shards of parameters, gradients and optimizer state, each with a part of the batch.
      tensor: shards of heads, MLP width and vocabulary (Megatron-LM).
      sequence: shards of the sequence, each with a part of every row (context parallelism).
      expert: shards of the experts, each with a part of the batch.
      stage: pipeline stages, each with a part of the layers.
      layout: how the ranks that share the work of a parameter share its bytes: a key of `ml.parallel.LAYOUTS`.
      sequence_residual: under tensor parallelism, cut the residual stream and its norms along the sequence between
        blocks (Korthikanti et al. 2022): the same bytes on the wire, ``1 / tensor`` of the memory.
      sequence_order: which tokens of a row each shard of the sequence holds (`ml.parallel.context.chunks`).
      slices: groups of devices joined by a slower network (TPU slices over DCN); they divide ``slice_axis``.
      slice_axis: the axis that spans the slices.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1
    expert: int = 1
    stage: int = 1
    layout: Literal["ddp", "zero1", "zero2", "zero3", "hybrid"] = "hybrid"
    sequence_residual: bool = False
    sequence_order: Literal["zigzag", "contiguous"] = "zigzag"
    slices: int = 1
    slice_axis: Literal["data", "stage"] = "data"

    def __post_init__(self):
        sizes = tuple(self.degrees.values())
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError(f"degrees {sizes} must be positive, and at most one of them -1")
        if self.slices < 1:
            raise ValueError(f"slices={self.slices} must be positive")

    @property
    def degrees(self) -> dict[str, int]:
        """The degree of each mesh axis, in the fields' order."""
        fields = [field.name for field in dataclasses.fields(self) if field.name in AXES]
        return {name: getattr(self, name) for name in fields}

    def fitted(self, count: int) -> dict[str, int]:
        """The degrees on ``count`` devices, in the mesh's order, with -1 resolved.

        Raises:
          UserError: they do not multiply to ``count``, or the slices do not divide their axis.
        """
        sizes = self.degrees
        known = math.prod(size for size in sizes.values() if size != -1)
        free = count // known if -1 in sizes.values() else 1
        if known * free != count:
            asked = " x ".join(f"{name}={size}" for name, size in sizes.items())
            raise UserError(f"config.mesh: {asked} does not fit {count} devices; {_mend(sizes, count)}")
        sizes = {name: free if sizes[name] == -1 else sizes[name] for name in AXES}
        spanning, slices = self.slice_axis, self.slices
        if sizes[spanning] % slices:
            raise UserError(
                f"config.mesh.slices={slices} does not divide {spanning}={sizes[spanning]}, the axis that spans the "
                f"slices; make config.mesh.{spanning} a multiple of {slices}"
            )
        return sizes


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Arranges ``devices`` (default: all) in a mesh with explicit axes, so that sharding is part of every array's type.

    Raises:
      UserError: the degrees do not multiply to the number of devices, or there are not that many slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = config.fitted(len(devices))
    shape, types = tuple(sizes.values()), (AxisType.Explicit,) * len(sizes)
    if config.slices == 1:
        try:
            return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
        except NotImplementedError:  # some degree is no product of whole axes of the TPUs' torus: part of one, then
            placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
            return Mesh(placed, AXES, axis_types=types)
    return Mesh(_across_slices(shape, config, devices), AXES, axis_types=types)


def _across_slices(shape: tuple[int, ...], config: MeshConfig, devices: list[Any]) -> np.ndarray:
    """The devices as an array of ``shape`` whose ``slice_axis`` counts slices first, devices of one slice after."""
    slices, axis = config.slices, AXES.index(config.slice_axis)
    inner = tuple(size // slices if i == axis else size for i, size in enumerate(shape))
    outer = tuple(slices if i == axis else 1 for i in range(len(shape)))
    known = {getattr(device, "slice_index", None) for device in devices}
    if len(known) == 1:  # no hardware that knows of slices (CPUs, one pod emulating several): equal parts in order
        split = np.array(devices, dtype=object).reshape(slices, *inner)
        return np.moveaxis(split, 0, axis).reshape(shape)
    if len(known) != slices:
        raise UserError(
            f"config.mesh.slices={slices}, but the devices form {len(known)} slices; set it to {len(known)}"
        )
    return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)


def _mend(sizes: dict[str, int], count: int) -> str:
    """What to do about degrees whose product is not the number of devices."""
    for name in ("data", "fsdp"):
        others = math.prod(size for axis, size in sizes.items() if axis != name and size != -1)
        if -1 not in (size for axis, size in sizes.items() if axis != name) and count % others == 0:
            return f"their product must be {count}: try config.mesh.{name}={count // others}"
    misfits = [f"config.mesh.{name}={size}" for name, size in sizes.items() if size != -1 and count % size]
    divisors = ", ".join(str(size) for size in range(1, count + 1) if count % size == 0)
    which = f"; {' and '.join(misfits)} must be one of {divisors}" if misfits and count < 10_000 else ""
    return f"their product must be {count}{which}"
