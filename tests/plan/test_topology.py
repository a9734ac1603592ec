"""Machines by name, and the speed of mesh axes on them."""

import math

import numpy as np
import pytest

from ml.errors import UserError
from ml.parallel import AXES
from ml.plan.links import bandwidth, grid
from ml.plan.topology import FAMILIES, parse
from pallas_kernels.chips import CHIPS


@pytest.mark.parametrize(
    ("name", "devices", "platform"),
    [("v5e:16x16", 256, "tpu"), ("v5p:4x4x4", 64, "tpu"), ("2*v6e:2x4", 16, "tpu"), ("h200:8", 8, "gpu")],
)
def test_names(name, devices, platform):
    topology = parse(name)
    assert (topology.device_count, topology.platform) == (devices, platform)
    assert topology.chip is CHIPS[topology.kind.device_kind]
    assert topology.kind.usable_bytes < 1.01 * topology.chip.memory_bytes


def test_slices_may_be_given_apart():
    assert parse("v5e:4x4", slices=3).device_count == 48
    with pytest.raises(UserError, match="give the number of slices once"):
        parse("2*v5e:4x4", slices=3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", "write FAMILY:SHAPE, such as v5e:16x16"),
        ("v5e:16 x 16", "write FAMILY:SHAPE"),
        ("v5x:4x4", "unknown family 'v5x'; did you mean 'v5"),
        ("v5e:16x32", "no such shape; the nearest is v5e:16x16, valid for v5e are 2x2, 2x4"),
        ("v5p:4x4x5", "the nearest is v5p:4x4x4"),
        ("h200:6", "the nearest is h200:"),
    ],
)
def test_unknown_ones_name_the_nearest(name, message):
    with pytest.raises(UserError, match=message):
        parse(name)


def rate(name, axes, **degrees):
    """Bytes/s, in units of one link one way."""
    topology = parse(name)
    sizes = {axis: degrees.get(axis, 1) for axis in AXES}
    assert math.prod(sizes.values()) == topology.device_count
    return bandwidth(topology, grid(topology, sizes), axes) / topology.chip.link_bandwidth


@pytest.mark.parametrize(
    ("name", "degrees", "axes", "links"),
    [
        ("v5e:16x16", {"fsdp": 256}, ("fsdp",), 4),  # two rings, each both ways
        ("v5e:16x16", {"fsdp": 16, "tensor": 16}, ("fsdp",), 2),
        ("v5e:16x16", {"fsdp": 32, "tensor": 8}, ("tensor",), 1),  # half a ring is a line
        ("v5e:8x8", {"fsdp": 64}, ("fsdp",), 2),  # a part of a pod is not closed
        ("v5p:4x4x4", {"fsdp": 64}, ("fsdp",), 6),
        ("v5p:4x4x4", {"fsdp": 16, "tensor": 4}, ("fsdp",), 4),
        ("v5p:2x2x1", {"fsdp": 2, "tensor": 2}, ("tensor",), 1),
        ("v5e:4x4", {"fsdp": 16}, ("tensor",), math.inf),
        ("h200:8", {"fsdp": 8}, ("fsdp",), 1),
    ],
)
def test_links_along_an_axis(name, degrees, axes, links):
    assert rate(name, axes, **degrees) == links


def test_what_crosses_slices_is_bound_by_the_network():
    topology = parse("2*v5e:16x16")
    sizes = {axis: {"data": 2, "fsdp": 256}.get(axis, 1) for axis in AXES}
    devices = grid(topology, sizes)
    assert bandwidth(topology, devices, ("data",)) == topology.chip.network_bandwidth
    assert bandwidth(topology, devices, ("fsdp",)) == 4 * topology.chip.link_bandwidth
    both = bandwidth(topology, devices, ("data", "fsdp"))
    assert both == pytest.approx(1 / (1 / 200e9 + 1 / (256 * 3.125e9)))
    # Nodes of eight GPUs are joined by the network too.
    assert bandwidth(parse("h200:16"), grid(parse("h200:16"), {**sizes, "fsdp": 8}), ("data",)) == 50e9


@pytest.mark.parametrize("name", ["v5e:4x4", "v5p:2x2x2", "2*v6e:2x2"])
def test_a_grid_holds_what_the_compiler_describes(name):
    pytest.importorskip("libtpu", reason="libtpu has no wheel for this machine")
    topology = parse(name)
    devices = topology.devices()
    assert len(devices) == topology.device_count
    described = {(getattr(d, "slice_index", 0), *d.coords)[: 1 + len(topology.shape)] for d in devices}
    sizes = dict.fromkeys(AXES, 1) | {"data": topology.device_count}
    assert {(p.slice_index, *p.coords) for p in np.ravel(grid(topology, sizes))} == described
    assert {device.device_kind for device in devices} <= set(CHIPS)
    assert CHIPS[devices[0].device_kind] == topology.chip


def test_every_family_is_whole():
    for family in FAMILIES.values():
        assert family.chip.link_bandwidth and family.chip.network_bandwidth
