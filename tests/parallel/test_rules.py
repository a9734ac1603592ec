"""The layout table: where parameters and batches go, and what it refuses."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from training_cases import MODELS, initial_params

from ml.errors import UserError
from ml.models import logical_axes
from ml.parallel import MeshConfig, Rules, make_mesh


def rules(data=1, fsdp=1, tensor=1):
    return Rules(make_mesh(MeshConfig(data, fsdp, tensor), jax.devices()[: data * fsdp * tensor]))


@pytest.mark.parametrize(
    ("axes", "spec"),
    [
        (("vocab", "embed"), PartitionSpec("tensor", "fsdp")),
        (("layers", "embed", "heads", "head_dim"), PartitionSpec(None, "fsdp", "tensor", None)),
        (("layers", "heads", "head_dim", "embed"), PartitionSpec(None, "tensor", None, "fsdp")),
        (("layers", "mlp", "embed"), PartitionSpec(None, "tensor", "fsdp")),
        (("layers", "expert", "embed", "mlp"), PartitionSpec(None, None, "fsdp", "tensor")),
        (("layers", "norm"), PartitionSpec(None, None)),
        (("batch", "length", None), PartitionSpec(("data", "fsdp"), None, None)),
    ],
)
def test_the_table(axes, spec):
    assert rules(2, 2, 2).spec(*axes) == spec


def test_mesh_axes_of_size_one_are_not_named():
    assert rules(8).spec("vocab", "embed") == PartitionSpec(None, None)
    assert rules(8).spec("batch", "length") == PartitionSpec("data", None)
    assert rules(1, 8).spec("batch", "length") == PartitionSpec("fsdp", None)


def test_an_axis_without_a_rule_is_refused_and_a_mesh_axis_is_used_once():
    with pytest.raises(ValueError, match="'embedd' is in no rule"):
        rules(8).spec("embedd")
    with pytest.raises(ValueError, match="'fsdp' twice"):
        rules(1, 8).spec("batch", "embed")


@pytest.mark.parametrize("name", MODELS)
def test_each_device_holds_its_share_of_every_matrix(name):
    axes, params = logical_axes(MODELS[name]), initial_params(MODELS[name])
    shardings = rules(2, 2, 2).shardings(axes, params)

    def share(names, x, sharding):
        wanted = np.prod([2 for axis in names if axis in ("embed", "vocab", "heads", "kv_heads", "mlp")], dtype=int)
        assert np.prod(sharding.shard_shape(x.shape)) * wanted == x.size, names
        return wanted

    shares = jax.tree.leaves(jax.tree.map(share, axes, params, shardings, is_leaf=lambda x: isinstance(x, tuple)))
    assert max(shares) == 4, "some matrix is cut both ways"


def test_an_axis_that_does_not_divide_is_named():
    axes, params = logical_axes(MODELS["dense"]), initial_params(MODELS["dense"])
    message = r"config.mesh.tensor=8 does not divide the model's (kv_)?heads axis of 2; choose a divisor of 2"
    with pytest.raises(UserError, match=message):
        rules(1, 1, 8).shardings(axes, params)
