"""Weights in shards: products are those of the whole weight, gradients come back cut and summed, or stay apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ml.parallel import MeshConfig, make_mesh
from ml.weights import Gathered, dot, materialize, ragged_dot, take
from ml.weights.shards import gathered, held_axes, scattered

BATCH, LENGTH, EMBED, WIDE = 8, 4, 16, 6
RANDOM = np.random.default_rng(0)
X, W = RANDOM.normal(size=(BATCH, LENGTH, EMBED)), RANDOM.normal(size=(EMBED, WIDE))
WEIGHT = RANDOM.normal(size=(BATCH, LENGTH, WIDE))  # of each result in the scalar that is differentiated
MESH = make_mesh(MeshConfig(2, 2, 2))
TOKENS = PartitionSpec(("data", "fsdp"), None, None)


def on_mesh(value, *entries, **kinds):
    return jax.device_put(jnp.asarray(value, jnp.float32), NamedSharding(MESH, PartitionSpec(*entries, **kinds)))


def result(w, x=None):
    x = on_mesh(X, *TOKENS) if x is None else x
    return dot("ble,em->blm", x, w, out_sharding=PartitionSpec(*TOKENS[:2], "tensor"))


def objective(w):
    return (result(w) * on_mesh(WEIGHT, *TOKENS[:2], "tensor")).sum()


@pytest.mark.parametrize("cut", [("fsdp",), ("data", "fsdp"), ("fsdp", "data")])
def test_a_product_with_shards_and_its_gradient(cut):
    with jax.set_mesh(MESH):
        w = on_mesh(W, cut, "tensor")
        np.testing.assert_allclose(result(w), X @ W, rtol=1e-5, atol=1e-5)
        gradient = jax.jit(jax.grad(objective))(w)
    assert gradient.sharding == w.sharding
    np.testing.assert_allclose(gradient, np.einsum("ble,blm->em", X, WEIGHT), rtol=1e-5, atol=1e-5)


def test_no_product_keeps_the_whole_weight_for_its_gradient():
    with jax.set_mesh(MESH):
        w, x = on_mesh(W, ("data", "fsdp"), "tensor"), on_mesh(X, *TOKENS)
        _, pullback = jax.vjp(result, w, x)
        kept = [jax.typeof(leaf) for leaf in jax.tree.leaves(pullback) if hasattr(leaf, "sharding")]
    weights = [kind for kind in kept if kind.shape == (EMBED, WIDE)]
    assert weights and all(kind.sharding.spec.partitions[0] == ("data", "fsdp") for kind in weights)


def test_a_gradient_stays_apart_where_the_weight_is_typed_so():
    with jax.set_mesh(MESH):

        @jax.jit
        def step(w):
            typed = jax.reshard(w, PartitionSpec("fsdp", "tensor", reduced={"data"}))
            gradient = jax.grad(objective)(typed)
            assert jax.typeof(gradient).sharding.spec.unreduced == {"data"}
            return jax.reshard(gradient, PartitionSpec("fsdp", "tensor"))

        gradient = step(on_mesh(W, "fsdp", "tensor"))
    np.testing.assert_allclose(gradient, np.einsum("ble,blm->em", X, WEIGHT), rtol=1e-5, atol=1e-5)


def test_gathering_and_scattering_are_each_others_transpose():
    with jax.set_mesh(MESH):
        w = on_mesh(W, ("data", "fsdp"), "tensor")
        assert held_axes(w) == {"data", "fsdp", "tensor"}

        @jax.jit
        def of_ones(w):
            whole = gathered(w, frozenset({"data", "fsdp"}))
            assert held_axes(whole) == {"tensor"}
            _, pullback = jax.vjp(lambda v: result(v, on_mesh(np.ones_like(X), *TOKENS)), whole)
            (partial,) = pullback(on_mesh(np.ones_like(WEIGHT), *TOKENS[:2], "tensor"))
            return scattered(partial, w)

        gradient = of_ones(w)
    assert gradient.sharding == w.sharding
    np.testing.assert_array_equal(gradient, np.full((EMBED, WIDE), BATCH * LENGTH))


@pytest.mark.parametrize("cut", ["fsdp", ("data", "fsdp")])
def test_a_lookup_in_a_table_that_is_cut_along_its_columns(cut):
    table, indices = RANDOM.normal(size=(32, EMBED)), RANDOM.integers(0, 32, (BATCH, LENGTH))
    weight = RANDOM.normal(size=(BATCH, LENGTH, EMBED))
    with jax.set_mesh(MESH):
        placed = jax.device_put(jnp.asarray(indices), NamedSharding(MESH, PartitionSpec(*TOKENS[:2])))

        def looked_up(w):
            return take(placed, w, out_sharding=TOKENS)

        w = on_mesh(table, "tensor", cut)
        rows = looked_up(w)
        gradient = jax.jit(jax.grad(lambda w: (looked_up(w) * on_mesh(weight, *TOKENS)).sum()))(w)
    assert rows.sharding.spec == TOKENS and gradient.sharding == w.sharding
    np.testing.assert_array_equal(rows, table.astype(np.float32)[indices])
    wanted = np.zeros_like(table)
    np.add.at(wanted, indices, weight)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-5)


def test_a_pair_is_multiplied_by_its_copy_and_gives_the_gradient_to_its_shard():
    copy = jnp.asarray(W + 1, jnp.bfloat16)  # not the shard's values: what is read must be the copy
    x = jnp.asarray(X, jnp.float32)
    groups = jnp.array([3, 5], jnp.int32)
    stacked = jnp.stack([copy, 2 * copy])
    operations = {
        "dot": (copy, lambda w: dot("ble,em->blm", x, w)),
        "take": (copy, lambda w: take(jnp.array([3, 3, 1]), w)),
        "materialize": (copy, lambda w: materialize(w) ** 2),
        "ragged_dot": (stacked, lambda w: ragged_dot(x[:, 0], groups, w)),
    }
    for name, (full, operation) in operations.items():
        shard = jnp.zeros(full.shape, jnp.float32)
        got = jax.grad(lambda shard, f=full, op=operation: op(Gathered(shard, f)).astype(jnp.float32).sum())(shard)
        wanted = jax.grad(lambda w, op=operation: op(w).astype(jnp.float32).sum())(full)
        np.testing.assert_array_equal(operation(Gathered(shard, full)), operation(full), err_msg=name)
        assert got.dtype == jnp.float32, name
        np.testing.assert_allclose(got, wanted.astype(jnp.float32), rtol=1e-2, err_msg=name)
