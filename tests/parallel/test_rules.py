"""The layout table: where parameters and batches go, and what it refuses."""

import math
import typing

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from training_cases import MODELS, initial_params

from ml.errors import UserError
from ml.models import logical_axes
from ml.parallel import LAYOUTS, MeshConfig, Rules


def rules(*degrees, **settings):
    config = MeshConfig(*degrees, **{"data": 1} | settings if not degrees else settings)
    return Rules.make(config, jax.devices()[: math.prod(config.degrees.values())])


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


# What is left whole of the embed axis of a kernel [embed, mlp] at data=2, fsdp=2, tensor=2.
@pytest.mark.parametrize(
    ("layout", "state", "compute", "gradients"),
    [
        ("ddp", None, None, None),
        ("zero1", ("data", "fsdp"), None, None),
        ("zero2", ("data", "fsdp"), None, ("data", "fsdp")),
        ("zero3", ("data", "fsdp"), ("data", "fsdp"), ("data", "fsdp")),
        ("hybrid", "fsdp", "fsdp", "fsdp"),
    ],
)
def test_each_layout(layout, state, compute, gradients):
    table = rules(2, 2, 2, layout=layout)
    for kind, cut in {"state": state, "compute": compute, "gradients": gradients}.items():
        assert table.spec("embed", "mlp", kind=kind) == PartitionSpec(cut, "tensor")
        assert table.spec("batch", "length", None, kind=kind) == PartitionSpec(("data", "fsdp"), None, None)


def test_ranks_that_share_a_parameters_work_are_those_of_sequence_and_experts_too():
    table = rules(1, 2, sequence=2, expert=2)
    assert table.spec("layers", "embed", "mlp") == PartitionSpec(None, ("fsdp", "expert", "sequence"), None)
    experts = table.spec("layers", "expert", "expert_embed", "mlp")
    assert experts == PartitionSpec(None, "expert", ("fsdp", "sequence"), None)
    assert table.spec("batch", "length", "heads") == PartitionSpec(("fsdp", "expert"), "sequence", None)
    assert rules(stage=4, fsdp=2).spec("layers", "embed") == PartitionSpec("stage", "fsdp")


def test_the_residual_stream_may_be_cut_along_the_sequence():
    assert rules(2, 1, 4).spec("batch", "residual", None) == PartitionSpec("data", None, None)
    table = rules(1, 1, 4, sequence=2, sequence_residual=True)
    assert table.spec("batch", "residual", None) == PartitionSpec(None, ("sequence", "tensor"), None)
    assert table.spec("batch", "length", "mlp") == PartitionSpec(None, "sequence", "tensor")


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
        cut = ("embed", "expert_embed", "vocab", "heads", "kv_heads", "mlp")
        wanted = np.prod([2 for axis in names if axis in cut], dtype=int)
        assert np.prod(sharding.shard_shape(x.shape)) * wanted == x.size, names
        return wanted

    shares = jax.tree.leaves(jax.tree.map(share, axes, params, shardings, is_leaf=lambda x: isinstance(x, tuple)))
    assert max(shares) == 4, "some matrix is cut both ways"


def test_an_axis_that_does_not_divide_is_named():
    axes, params = logical_axes(MODELS["dense"]), initial_params(MODELS["dense"])
    message = r"config.mesh.tensor=8 does not divide the model's (kv_)?heads axis of 2; choose a divisor of 2"
    with pytest.raises(UserError, match=message):
        rules(1, 1, 8).shardings(axes, params)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("hybrid", "config.mesh.fsdp=2 does not divide .* embed axis of 9; choose a divisor of 9"),
        ("zero3", r"data=4 x fsdp=2 \(layout zero3\) does not divide .* embed axis of 9; .*another config.mesh.layout"),
    ],
)
def test_a_product_of_degrees_that_does_not_divide_is_named(layout, message):
    with pytest.raises(UserError, match=message):
        rules(4, 2, layout=layout).shardings({"w": ("embed", "mlp")}, {"w": np.zeros((9, 4))})


def test_every_layout_that_may_be_configured_is_in_the_table():
    choices = typing.get_args(typing.get_type_hints(MeshConfig)["layout"])
    assert set(choices) == set(LAYOUTS)
