"""Typed leaves: a way to store weights that only this file knows runs through scan, remat and grad of a model."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ml.models import MoEConfig, Transformer, TransformerConfig, init_params
from ml.weights import dot, materialize, ragged_dot, take

CONFIG = TransformerConfig(
    vocab_size=23,
    num_layers=3,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    mlp_dim=24,
    qkv_bias=True,
    tie_embeddings=True,
    init_stddev=0.2,
)
EXPERTS = dataclasses.replace(CONFIG, moe=MoEConfig(num_experts=4, top_k=2, mlp_dim=8), tie_embeddings=False)


@flax.struct.dataclass
class Scaled8:
    """Whole numbers and one scale for each slice of the last axis."""

    whole: jax.Array
    scale: jax.Array

    def dense(self):
        return self.whole.astype(jnp.float32) * self.scale

    @classmethod
    def of(cls, w):
        scale = np.abs(w).max(axis=-1, keepdims=True) / 127
        return cls(jnp.asarray(np.round(w / scale), jnp.int8), jnp.asarray(scale))


@flax.struct.dataclass
class LowRank:
    """A frozen matrix plus a product of two thin ones; not of the shape that the module declares."""

    down: jax.Array
    up: jax.Array
    base: jax.Array

    def dense(self):
        return self.base + jnp.einsum("...ir,...ro->...io", self.down, self.up).reshape(self.base.shape)


for leaf in (Scaled8, LowRank):
    dot.register(leaf)(lambda spec, x, w, *, out_sharding=None: dot(spec, x, w.dense(), out_sharding=out_sharding))
    ragged_dot.register(leaf)(lambda x, sizes, w: ragged_dot(x, sizes, w.dense()))
    take.register(leaf)(lambda indices, w, *, dtype=None, out_sharding=None: take(indices, w.dense(), dtype=dtype))
    materialize.register(leaf)(lambda w: w.dense())


def _low_rank(w, rank=2):
    """``w`` as is, with an adapter that changes it."""
    rng = np.random.default_rng(1)
    lead, inner, outer = w.shape[:1], w.shape[1], int(np.prod(w.shape[2:]))
    down, up = rng.normal(size=(*lead, inner, rank)), rng.normal(size=(*lead, rank, outer))
    return LowRank(jnp.asarray(0.1 * down, jnp.float32), jnp.asarray(up, jnp.float32), jnp.asarray(w))


def _typed(params):
    """Every leaf but the adapted MLP kernel as whole numbers; biases and norm scales too."""
    params = jax.tree.map(lambda w: Scaled8.of(np.asarray(w) + 0.01), params)
    if "mlp" in params["layers"]:
        params["layers"]["mlp"]["up"]["kernel"] = _low_rank(params["layers"]["mlp"]["up"]["kernel"].dense())
    return params


def _dense(params):
    return jax.tree.map(lambda w: w.dense(), params, is_leaf=lambda w: isinstance(w, (Scaled8, LowRank)))


def _loss(model):
    tokens = np.random.default_rng(0).integers(0, 23, (2, 9))

    def loss(params):
        logits = model.apply({"params": params}, tokens, method="forward")
        return jnp.square(logits).mean(), logits

    return loss


@pytest.mark.sweep("none-experts", "full-dense")
@pytest.mark.parametrize("config", [CONFIG, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_typed_leaves_give_the_logits_of_the_dense_weights(config, remat):
    model = Transformer(config, remat=remat)
    params = _typed(jax.jit(init_params, static_argnums=0)(model, jax.random.key(0)))
    logits = jax.jit(_loss(model))(params)[1]
    expected = jax.jit(_loss(model))(_dense(params))[1]
    assert expected.std() > 0.1
    np.testing.assert_allclose(logits, expected, atol=1e-5)


@pytest.mark.sweep("full")
@pytest.mark.parametrize("remat", ["none", "full"])
def test_gradient_reaches_the_arrays_inside_a_leaf(remat):
    model = Transformer(CONFIG, remat=remat)
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
    up = _low_rank(np.asarray(params["layers"]["mlp"]["up"]["kernel"]))

    def with_up(up):
        mlp = params["layers"]["mlp"] | {"up": {"kernel": up}}
        return _loss(model)(params | {"layers": params["layers"] | {"mlp": mlp}})[0]

    gradient = jax.jit(jax.grad(with_up))(up)
    to_dense = jax.jit(jax.grad(with_up))(up.dense())
    assert np.abs(to_dense).max() > 1e-4
    np.testing.assert_allclose(gradient.base, to_dense, atol=1e-6)
    np.testing.assert_allclose(gradient.down, np.einsum("lio,lro->lir", to_dense, up.up), atol=1e-6)
    np.testing.assert_allclose(gradient.up, np.einsum("lio,lir->lro", to_dense, up.down), atol=1e-6)


def test_operations_on_plain_arrays():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(5, 3)).astype(np.float32), rng.normal(size=(2, 3, 4)).astype(np.float32)
    np.testing.assert_allclose(dot("se,hed->shd", x, w), np.einsum("se,hed->shd", x, w), atol=1e-5)
    grouped = ragged_dot(jnp.asarray(x), jnp.array([2, 3]), w)
    np.testing.assert_allclose(grouped, np.concatenate([x[:2] @ w[0], x[2:] @ w[1]]), atol=1e-5)
    np.testing.assert_array_equal(take(jnp.array([[2, 0]]), jnp.asarray(x)), x[[[2, 0]]])
    np.testing.assert_array_equal(materialize(x), x)


def test_results_have_the_dtype_of_activations():
    x, w = jnp.ones((5, 3), jnp.bfloat16), jnp.ones((2, 3, 4))
    assert dot("se,hed->shd", x, w).dtype == jnp.bfloat16
    assert ragged_dot(x, jnp.array([2, 3]), w).dtype == jnp.bfloat16
    assert take(jnp.array([0]), jnp.ones((2, 3)), dtype=jnp.bfloat16).dtype == jnp.bfloat16
    assert take(jnp.array([0]), jnp.ones((2, 3))).dtype == jnp.float32


@pytest.mark.parametrize(
    "operation",
    [
        lambda w: dot("se,ed->sd", jnp.ones((2, 3)), w),
        lambda w: ragged_dot(jnp.ones((2, 3)), jnp.array([2]), w),
        lambda w: take(jnp.array([0]), w),
        materialize,
    ],
    ids=["dot", "ragged_dot", "take", "materialize"],
)
def test_a_leaf_without_a_rule_is_refused_by_name(operation):
    class Unknown:
        pass

    with pytest.raises(TypeError, match="no rule for a leaf of type Unknown"):
        operation(Unknown())
