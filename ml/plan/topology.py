"""Machines by name, such as ``v5e:16x16`` or ``2*v5p:4x4x4``: how many devices, how they are joined, and themselves.

The devices need not exist: their compilers can describe them (`jax.experimental.topologies`).
"""

import dataclasses
import math
import re
from typing import Any

import jax

from ml.errors import UserError, nearest
from pallas_kernels import absent
from pallas_kernels.chips import CHIPS, Chip

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of machine.

    Attributes:
      device_kind: key of `pallas_kernels.chips.CHIPS`.
      usable_bytes: of one device's memory, what a program may have: what the TPU compiler names when it refuses one; of
        a GPU 93% of what its driver reports, the rest being for the driver, cuDNN and NCCL.
      shapes: the sizes that are offered, in chips.
      wrap: an axis of the torus closes to a ring if its extent is a multiple of this. Two-dimensional pods are wired
        so only in full (16), three-dimensional ones in cubes of 4. 0: no torus but a switch.
      wheels: what pip must install to compile for it.
    """

    device_kind: str
    usable_bytes: float
    shapes: tuple[tuple[int, ...], ...]
    wrap: int
    wheels: str

    @property
    def chip(self) -> Chip:
        """Its data sheet."""
        return CHIPS[self.device_kind]


_SQUARES = ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_CUBES = (
    *((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8)),
    *((8, 8, 16), (8, 16, 16), (16, 16, 16), (16, 16, 24)),
)
_NODES = ((1,), (2,), (4,), (8,), (16,), (32,), (64,), (128,), (256,), (512,))
GPUS_PER_NODE = 8
# Shapes: cloud.google.com/tpu/docs, one page per generation. One host's GPUs share NVLink.
FAMILIES = {
    "v5e": Family("TPU v5e", 15.75 * _GIB, _SQUARES, 16, "libtpu"),
    "v5p": Family("TPU v5p", 95.73 * _GIB, _CUBES, 4, "libtpu"),
    "v6e": Family("TPU v6e", 31.25 * _GIB, _SQUARES, 16, "libtpu"),
    "h200": Family("NVIDIA H200", 0.93 * 139 * _GIB, _NODES, 0, '"jax[cuda13]"'),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """One machine.

    Attributes:
      name: as the user wrote it.
      family: key of `FAMILIES`.
      shape: chips of a slice along each axis of its torus; of GPUs the number alone.
      slices: groups that are joined by a slower network.
    """

    name: str
    family: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def kind(self) -> Family:
        """What it is made of."""
        return FAMILIES[self.family]

    @property
    def chip(self) -> Chip:
        """The data sheet of a device."""
        return self.kind.chip

    @property
    def device_count(self) -> int:
        """Devices in all slices."""
        return self.slices * math.prod(self.shape)

    @property
    def platform(self) -> str:
        """``tpu`` or ``gpu``."""
        return "tpu" if self.kind.wrap else "gpu"

    def devices(self) -> list[Any]:
        """The devices, described by their compiler; none of them is touched.

        Raises:
          UserError: that compiler is not installed.
        """
        shape: tuple[int, ...] = self.shape
        if self.platform == "gpu":
            (count,) = self.shape
            per_node = min(count, GPUS_PER_NODE)
            shape = (count // per_node, per_node)
        try:
            return absent.devices(self.family, shape, self.slices)
        except absent.CompilerMissing as error:
            raise UserError(f"--topology={self.name}: {error}; try pip install {self.kind.wheels}") from error


def parse(name: str, slices: int = 1) -> Topology:
    """Reads a name: ``FAMILY:SHAPE``, or ``N*FAMILY:SHAPE`` for ``N`` slices.

    Args:
      name: such as ``v5e:16x16``, ``2*v5p:4x4x4`` or ``h200:8``.
      slices: number of slices, if the name does not say.

    Raises:
      UserError: no such machine; names the nearest one.
    """
    match = re.fullmatch(r"(?:(\d+)\*)?([a-z]\w*):(\d+(?:x\d+)*)", name.strip().lower())
    if match is None:
        raise UserError(f"--topology={name}: write FAMILY:SHAPE, such as {_examples()}, or 2*v5e:16x16 for two slices")
    family = match.group(2)
    if family not in FAMILIES:
        raise UserError(f"--topology={name}: unknown family {family!r}; {nearest(family, FAMILIES)}")
    shape = tuple(int(extent) for extent in match.group(3).split("x"))
    known = FAMILIES[family].shapes
    if shape not in known:
        closest = min(known, key=lambda s: (abs(math.log(math.prod(s) / max(1, math.prod(shape)))), s))
        valid = ", ".join("x".join(map(str, s)) for s in known)
        hint = f"{family}:{'x'.join(map(str, closest))}"
        raise UserError(f"--topology={name}: no such shape; the nearest is {hint}, valid for {family} are {valid}")
    count = int(match.group(1) or slices)
    if count < 1 or (match.group(1) and slices not in (1, count)):
        raise UserError(f"--topology={name} with --slices={slices}: give the number of slices once, at least 1")
    return Topology(name, family, shape, count)


def use_compilers_alone() -> None:
    """Keeps JAX from taking hold of this machine's accelerators; call it before JAX makes an array."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # it can be written for absent devices, but not read


def _examples() -> str:
    return ", ".join(f"{name}:{'x'.join(map(str, kind.shapes[-1]))}" for name, kind in FAMILIES.items())
