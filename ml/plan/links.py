"""How fast the mesh axes of a topology are: which links of the torus, switch or network they run along."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ml.parallel import AXES
from ml.plan.topology import GPUS_PER_NODE, Topology


def bandwidth(topology: Topology, devices: np.ndarray, axes: Sequence[str]) -> float:
    """Bytes/s that each device can send in a collective along ``axes``, as optimal algorithms use the links.

    A closed ring of the torus carries both ways at once; an open line is bounded by its ends, which have one link; axes
    of the torus add up. A group that spans slices or nodes does its part inside each, then sends ``1 / inside`` of it
    over the network (Pipette's hierarchical rings).

    Args:
      topology: the machine.
      devices: of the mesh, one array axis for each of `ml.parallel.AXES`; what `Topology.devices` or `grid` gives.
      axes: mesh axes.
    """
    at = tuple(slice(None) if name in axes else 0 for name in AXES)
    group = list(np.ravel(devices[at]))
    if len(group) < 2:
        return math.inf
    islands = len({_island(topology, device) for device in group})
    inside = len(group) // islands
    chip = topology.chip
    assert chip.link_bandwidth is not None and chip.network_bandwidth is not None
    seconds = 0.0
    if inside > 1:
        seconds += 1 / (chip.link_bandwidth * _links(topology, group))
    if islands > 1:
        seconds += 1 / (chip.network_bandwidth * inside)
    return 1 / seconds


def grid(topology: Topology, degrees: Mapping[str, int]) -> np.ndarray:
    """Positions on a mesh of these degrees, as an array like a mesh's devices: what compilers would likely place.

    The innermost mesh axes lie along the torus' last axes. Slices are counted along the first axis that they divide.
    """
    inner = [_Position(at, 0, i) for i, at in enumerate(np.ndindex(*topology.shape))]
    shape = [degrees[name] for name in AXES]
    spanning = next(i for i, size in enumerate(shape) if size % topology.slices == 0)
    shape[spanning] //= topology.slices
    slices = []
    for index in range(topology.slices):
        part = np.empty(len(inner), object)
        part[:] = [_Position(p.coords, index, p.id + index * len(inner)) for p in inner]
        slices.append(part.reshape(shape))
    return np.concatenate(slices, axis=spanning)


class _Position:
    """What of a device matters here."""

    def __init__(self, coords: tuple[int, ...], slice_index: int, id: int):
        self.coords, self.slice_index, self.id = coords, slice_index, id


def _island(topology: Topology, device: Any) -> int:
    """Devices of one island reach each other without the network."""
    if topology.platform == "tpu":
        return getattr(device, "slice_index", 0) or 0
    return device.id // GPUS_PER_NODE


def _links(topology: Topology, group: list[Any]) -> int:
    if topology.platform != "tpu":
        return 1
    first = _island(topology, group[0])
    coordinates = np.array([device.coords for device in group if _island(topology, device) == first])
    links = 0
    for values, extent in itertools.zip_longest(coordinates.T, topology.shape, fillvalue=1):
        different = len(np.unique(values))
        if different > 1:
            closed = different == extent and extent > 2 and extent % topology.kind.wrap == 0
            links += 2 if closed else 1
    return max(1, links)
