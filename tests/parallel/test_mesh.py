"""The mesh: degrees that fit the devices, and the one line for those that do not."""

import jax
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
    ],
)
def test_one_degree_may_be_left_open(config, shape):
    mesh = make_mesh(config)
    assert tuple(mesh.shape.values()) == shape
    assert tuple(mesh.shape) == ("data", "fsdp", "tensor")
    assert set(mesh.axis_types) == {AxisType.Explicit}
    assert sorted(device.id for device in mesh.devices.flat) == list(range(8))


def test_some_of_the_devices():
    mesh = make_mesh(MeshConfig(2, -1, 1), jax.devices()[:4])
    assert mesh.devices.shape == (2, 2, 1)


@pytest.mark.parametrize(
    "config", [MeshConfig(3, 1, 1), MeshConfig(-1, 3, 1), MeshConfig(16, -1, 1), MeshConfig(2, 2, 1)]
)
def test_degrees_that_do_not_fit_are_named_with_the_number_of_devices(config):
    with pytest.raises(UserError, match=rf"config.mesh: data={config.data} x .* 8 devices.* must be 8"):
        make_mesh(config)


@pytest.mark.parametrize("degrees", [{"data": 0}, {"fsdp": -2}, {"data": -1, "tensor": -1}])
def test_degrees_that_mean_nothing(degrees):
    with pytest.raises(UserError, match=r"^config.mesh: .*positive.*at most one"):
        build(MeshConfig, degrees, "config.mesh")
