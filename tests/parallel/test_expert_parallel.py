"""The mixture-of-experts layer on eight devices: the same numbers however tokens, experts and widths are spread."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from jax.sharding import PartitionSpec

from ml.errors import UserError
from ml.models import MoEConfig, TransformerConfig
from ml.models.moe import MoE, check_experts
from ml.parallel import MeshConfig, Rules, make_mesh

pytestmark = pytest.mark.usefixtures("quick_compilation")
BATCH, LENGTH, EMBED, WIDE, EXPERTS = 8, 4, 16, 12, 8
MESHES = {
    "expert 8": {"expert": 8},
    "expert 4 fsdp 2": {"expert": 4, "fsdp": 2},
    "expert 4 tensor 2": {"expert": 4, "tensor": 2},
    "expert 2 data 2 fsdp 2": {"expert": 2, "data": 2, "fsdp": 2},
    "expert 2 sequence 2 tensor 2": {"expert": 2, "sequence": 2, "tensor": 2},
    "fsdp 2 sequence 2 tensor 2": {"fsdp": 2, "sequence": 2, "tensor": 2},
}


def config(top_k=2, **options):
    moe = MoEConfig(EXPERTS, top_k, WIDE, **options)
    return TransformerConfig(
        vocab_size=8, num_layers=1, embed_dim=EMBED, num_heads=1, num_kv_heads=1, head_dim=4, mlp_dim=4, moe=moe
    )


def rules_of(degrees):
    degrees = {"data": 1} | degrees
    return Rules(make_mesh(MeshConfig(**degrees), jax.devices()[: math.prod(degrees.values())]))


def case(routing, model):
    """Parameters and inputs; ``one``: all tokens want expert 5 first, and most experts get none."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype(np.float32), meta.unbox(abstract(model)))
    x = rng.normal(size=(BATCH, LENGTH, EMBED)).astype(np.float32)
    if routing == "one":
        x = np.abs(x)
        params["router"]["kernel"][:] *= 0.01
        params["router"]["kernel"][:, 5] += 0.5
        params["router"]["kernel"][:, 2] += 0.2
    valid = rng.random((BATCH, LENGTH)) < 0.8
    weights = rng.normal(size=x.shape).astype(np.float32)
    return params, x, valid, weights


def abstract(model):
    return jax.eval_shape(lambda: MoE(model).init(jax.random.key(0), jnp.zeros((1, 1, EMBED))))["params"]


def axes_of(model):
    return jax.tree.map(lambda box: box.names, abstract(model), is_leaf=lambda x: isinstance(x, meta.AxisMetadata))


def objective(layer):
    def loss(params, x, valid, weights):
        out, stats = layer.apply({"params": params}, x, valid)
        return (weights * out).sum() + 3 * stats.balance, (out, stats)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


@functools.cache
def on_one_device(routing, model):
    return jax.device_get(objective(MoE(model))(*case(routing, model)))


def placed_case(routing, model, rules):
    params, x, valid, weights = case(routing, model)
    params = jax.device_put(params, rules.shardings(axes_of(model), params))
    rows = rules.sharding("batch", "length", None)
    x, weights = jax.device_put((x, weights), rows)
    return params, x, jax.device_put(valid, rules.sharding("batch", "length")), weights


def check_same(model, degrees, run):
    """Compares a run on a mesh with the one device, for even and for extreme routing."""
    for routing in ("random", "one"):
        with jax.set_mesh(rules_of(degrees).mesh):
            ((got, (out, stats)), gradients) = jax.device_get(run(*placed_case(routing, model, rules_of(degrees))))
        ((wanted, (wanted_out, wanted_stats)), wanted_gradients) = on_one_device(routing, model)
        assert ((wanted_stats.counts == 0).sum() > 4) == (routing == "one")
        np.testing.assert_array_equal(stats.counts, wanted_stats.counts)
        np.testing.assert_allclose(stats.balance, wanted_stats.balance, rtol=1e-5)
        np.testing.assert_allclose(got, wanted, rtol=1e-5)
        for a, b in zip(
            jax.tree.leaves((out, gradients)), jax.tree.leaves((wanted_out, wanted_gradients)), strict=True
        ):
            np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
            assert np.abs(b).max() > 1e-3


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("mesh", MESHES)
def test_same_output_loss_and_gradients_on_every_mesh(mesh, top_k):
    model = config(top_k, normalize_top_k=top_k > 1)
    check_same(model, MESHES[mesh], objective(MoE(model, place=rules_of(MESHES[mesh]).spec)))
