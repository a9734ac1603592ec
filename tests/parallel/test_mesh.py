"""The mesh: degrees that fit the devices, and the one line for those that do not."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from ml.config import build
from ml.errors import UserError
from ml.parallel import MeshConfig, make_mesh


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(1, -1, 1), (1, 8, 1)),
        (MeshConfig(2, -1, 2), (2, 2, 2)),
        (MeshConfig(2, 4, 1), (2, 4, 1)),
        (MeshConfig(1, 2, -1), (1, 2, 4)),
        (MeshConfig(stage=2, expert=2, sequence=2), (1, 1, 1)),
    ],
)
def test_one_degree_may_be_left_open(config, shape):
    mesh = make_mesh(config)
    assert tuple(mesh.shape[axis] for axis in ("data", "fsdp", "tensor")) == shape
    assert tuple(mesh.shape) == ("stage", "data", "fsdp", "expert", "sequence", "tensor")
    assert set(mesh.axis_types) == {AxisType.Explicit}
    assert sorted(device.id for device in mesh.devices.flat) == list(range(8))


def test_some_of_the_devices():
    mesh = make_mesh(MeshConfig(2, -1, 1), jax.devices()[:4])
    assert mesh.devices.shape == (1, 2, 2, 1, 1, 1)


def test_tensor_neighbours_are_neighbours_in_the_machine_and_stages_are_farthest():
    ids = np.vectorize(lambda device: device.id)(make_mesh(MeshConfig(2, 1, 2, stage=2)).devices).reshape(2, 2, 2)
    np.testing.assert_array_equal(ids, np.arange(8).reshape(2, 2, 2))


@pytest.mark.parametrize(
    ("config", "first"),
    [
        (MeshConfig(4, 2, slices=2), [0, 1, 2, 3]),  # data 0 and 1
        (MeshConfig(2, 2, stage=2, slices=2, slice_axis="stage"), [0, 1, 2, 3]),  # stage 0
        (MeshConfig(2, 2, stage=2, slices=2), [0, 1, 4, 5]),  # of stage 0, data 0 lies in slice 0, data 1 in slice 1
    ],
)
def test_slices_are_the_outer_part_of_their_axis(config, first):
    ids = [device.id for device in make_mesh(config).devices.flat]
    assert ids[:4] == first
    assert sorted(ids) == list(range(8))


class SliceDevice:
    """A device of a TPU slice, as far as the arrangement looks at it."""

    def __init__(self, number, slices):
        self.id, self.slice_index, self.process_index = number, number // (8 // slices), 0
        self.platform, self.device_kind = "cpu", "cpu"


def test_slices_of_the_hardware_are_counted_and_kept_together():
    devices = [SliceDevice(number, 2) for number in range(8)]
    with pytest.raises(UserError, match="slices=4, but the devices form 2 slices; set it to 2"):
        make_mesh(MeshConfig(slices=4), devices)
    mesh = make_mesh(MeshConfig(2, 4, slices=2), devices)
    assert [{device.slice_index for device in row.flat} for row in mesh.devices[0]] == [{0}, {1}]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(2, 4, slices=4), "slices=4 does not divide data=2.*make config.mesh.data a multiple of 4"),
        (MeshConfig(slices=2, slice_axis="stage"), "slices=2 does not divide stage=1"),
    ],
)
def test_slices_divide_their_axis(config, message):
    with pytest.raises(UserError, match=message):
        make_mesh(config)


@pytest.mark.parametrize(
    "config", [MeshConfig(3, 1, 1), MeshConfig(-1, 3, 1), MeshConfig(16, -1, 1), MeshConfig(2, 2, 1)]
)
def test_degrees_that_do_not_fit_are_named_with_the_number_of_devices(config):
    with pytest.raises(UserError, match=rf"config.mesh: data={config.data} x .* 8 devices.* must be 8"):
        make_mesh(config)


def test_the_mend_is_a_degree_that_fits():
    with pytest.raises(UserError, match=r"try config.mesh.data=4"):
        make_mesh(MeshConfig(3, 1, 2))


@pytest.mark.parametrize("degrees", [{"data": 0}, {"fsdp": -2}, {"data": -1, "tensor": -1}])
def test_degrees_that_mean_nothing(degrees):
    with pytest.raises(UserError, match=r"^config.mesh: .*positive.*at most one"):
        build(MeshConfig, degrees, "config.mesh")
