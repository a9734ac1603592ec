"""The parameter tree: its names, logical axes and initial values, for every option."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ml.errors import UserError
from ml.models import MoEConfig, Transformer, TransformerConfig, head_params, init_params, logical_axes
from ml.models.parameters import LogicalAxes, weight

CONFIG = TransformerConfig(
    vocab_size=31, num_layers=3, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=6, mlp_dim=20, max_length=11
)
EVERY_OPTION = {
    "plain": {},
    "biases": {"qkv_bias": True, "out_bias": True, "mlp_bias": True},
    "layer_norm": {"norm": "layer"},
    "learned_positions": {"position_embedding": "learned"},
    "qk_norm": {"qk_norm": True},
    "post_norms": {"post_norms": True, "norm_offset": True},
    "parallel_block": {"parallel_block": True},
    "ungated": {"gated_mlp": False},
    "tied": {"tie_embeddings": True},
    "experts": {"moe": MoEConfig(num_experts=5, top_k=2, mlp_dim=7)},
}
LAYER = {
    "attention_norm/scale": ((16,), ("norm",)),
    "attention/query/kernel": ((16, 4, 6), ("embed", "heads", "head_dim")),
    "attention/key/kernel": ((16, 2, 6), ("embed", "kv_heads", "head_dim")),
    "attention/value/kernel": ((16, 2, 6), ("embed", "kv_heads", "head_dim")),
    "attention/out/kernel": ((4, 6, 16), ("heads", "head_dim", "embed")),
    "mlp_norm/scale": ((16,), ("norm",)),
    "mlp/gate/kernel": ((16, 20), ("embed", "mlp")),
    "mlp/up/kernel": ((16, 20), ("embed", "mlp")),
    "mlp/down/kernel": ((20, 16), ("mlp", "embed")),
}
WHOLE = {
    "embed/embedding": ((31, 16), ("vocab", "embed")),
    "final_norm/scale": ((16,), ("norm",)),
    "unembed/kernel": ((16, 31), ("embed", "vocab")),
}
ADDED_TO_LAYER = {
    "biases": {
        "attention/query/bias": ((4, 6), ("heads", "head_dim")),
        "attention/key/bias": ((2, 6), ("kv_heads", "head_dim")),
        "attention/value/bias": ((2, 6), ("kv_heads", "head_dim")),
        "attention/out/bias": ((16,), ("norm",)),
        "mlp/gate/bias": ((20,), ("mlp",)),
        "mlp/up/bias": ((20,), ("mlp",)),
        "mlp/down/bias": ((16,), ("norm",)),
    },
    "layer_norm": {"attention_norm/bias": ((16,), ("norm",)), "mlp_norm/bias": ((16,), ("norm",))},
    "qk_norm": {"attention/query_norm/scale": ((6,), ("norm",)), "attention/key_norm/scale": ((6,), ("norm",))},
    "post_norms": {"post_attention_norm/scale": ((16,), ("norm",)), "post_mlp_norm/scale": ((16,), ("norm",))},
    "experts": {
        "moe/router/kernel": ((16, 5), ("embed", "expert_logits")),
        "moe/gate/kernel": ((5, 16, 7), ("expert", "expert_embed", "mlp")),
        "moe/up/kernel": ((5, 16, 7), ("expert", "expert_embed", "mlp")),
        "moe/down/kernel": ((5, 7, 16), ("expert", "mlp", "expert_embed")),
    },
}
ADDED = {
    "layer_norm": {"final_norm/bias": ((16,), ("norm",))},
    "learned_positions": {"position/embedding": ((11, 16), ("position", "embed"))},
}
REMOVED = {
    "parallel_block": ["mlp_norm/scale"],
    "ungated": ["mlp/gate/kernel"],
    "tied": ["unembed/kernel"],
    "experts": ["mlp/gate/kernel", "mlp/up/kernel", "mlp/down/kernel"],
}


def _expected(name):
    layer = LAYER | ADDED_TO_LAYER.get(name, {})
    layers = {f"layers/{path}": ((3, *shape), ("layers", *axes)) for path, (shape, axes) in layer.items()}
    table = WHOLE | ADDED.get(name, {}) | layers
    gone = {prefix + path for path in REMOVED.get(name, []) for prefix in ("", "layers/")}
    return {path: entry for path, entry in table.items() if path not in gone}


def _init(config, seed=0):
    return jax.jit(init_params, static_argnums=0)(Transformer(config), jax.random.key(seed))


def _flat(tree, is_leaf=None):
    return {
        "/".join(key.key for key in path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
    }


def _config(name):
    return dataclasses.replace(CONFIG, **EVERY_OPTION[name])


@pytest.mark.parametrize("name", EVERY_OPTION)
def test_names_shapes_and_axes(name):
    params = jax.eval_shape(lambda: init_params(Transformer(_config(name)), jax.random.key(0)))
    axes = logical_axes(_config(name))
    shapes = {path: leaf.shape for path, leaf in _flat(params).items()}
    names = _flat(axes, is_leaf=lambda x: isinstance(x, tuple))
    assert {path: (shapes[path], names[path]) for path in names} == _expected(name)
    assert shapes.keys() == names.keys()
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    # A tree of tuples maps onto the tree of parameters leaf by leaf.
    jax.tree.map(lambda leaf, names: None, params, axes, is_leaf=lambda x: isinstance(x, tuple))


def test_parameters_do_not_depend_on_dtype_or_remat():
    def structure(**options):
        return jax.eval_shape(lambda: init_params(Transformer(CONFIG, **options), jax.random.key(0)))

    assert structure(dtype=jnp.bfloat16) == structure(remat="full") == structure()


def test_initial_values():
    config = dataclasses.replace(
        CONFIG,
        vocab_size=500,
        num_layers=8,
        embed_dim=64,
        head_dim=16,
        mlp_dim=128,
        qkv_bias=True,
        norm="layer",
        qk_norm=True,
        init_stddev=0.05,
    )
    params = _flat(_init(config))
    for path, leaf in params.items():
        if path.endswith("scale"):
            np.testing.assert_array_equal(leaf, 1)
        elif path.endswith("bias"):
            np.testing.assert_array_equal(leaf, 0)
        else:
            residual = path in ("layers/attention/out/kernel", "layers/mlp/down/kernel")
            wanted = 0.05 / 4 if residual else 0.05  # sqrt(2 * 8 layers) = 4
            assert np.std(leaf) == pytest.approx(wanted, rel=0.03), path
            assert abs(np.mean(leaf)) < 0.05 * wanted, path
    query = params["layers/attention/query/kernel"]
    assert all(np.abs(query[i] - query[j]).max() > 0.05 for i in range(8) for j in range(i))


def test_experts_start_different_and_residual_ones_small():
    config = dataclasses.replace(_config("experts"), embed_dim=64, moe=MoEConfig(4, 2, 64))
    moe = _init(config)["layers"]["moe"]
    assert np.std(moe["down"]["kernel"]) == pytest.approx(0.02 / 6**0.5, rel=0.05)
    assert np.std(moe["up"]["kernel"]) == pytest.approx(0.02, rel=0.05)
    assert np.abs(moe["up"]["kernel"][:, 0] - moe["up"]["kernel"][:, 1]).max() > 0.02


def test_centred_norms_start_at_zero():
    params = _init(_config("post_norms"))
    for path, leaf in _flat(params).items():
        if path.endswith("scale"):
            np.testing.assert_array_equal(leaf, 0, err_msg=path)


def test_initialization_is_decided_by_the_key():
    def embedding(seed):
        return _init(CONFIG, seed)["embed"]["embedding"]

    np.testing.assert_array_equal(embedding(0), embedding(0))
    assert np.abs(embedding(0) - embedding(1)).max() > 0.01


@pytest.mark.parametrize("name", ["plain", "tied"])
def test_logits_read_only_the_head_parameters(name):
    config = _config(name)
    model = Transformer(config)
    params = _init(model.config)
    hidden = jax.random.normal(jax.random.key(1), (2, 3, config.embed_dim))
    head = head_params(config, params)
    assert set(head) == ({"embed"} if name == "tied" else {"unembed"})
    logits = model.apply({"params": head}, hidden, method="logits")
    matrix = params["embed"]["embedding"].T if name == "tied" else params["unembed"]["kernel"]
    np.testing.assert_allclose(logits, hidden @ matrix, atol=1e-5)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (("layers", "mlp", "up", "kernel"), "params lack layers/mlp/up/kernel"),
        (("embed", "embedding"), "params lack embed/embedding"),
    ],
)
def test_a_missing_parameter_is_named(path, message):
    model = Transformer(CONFIG)
    params = jax.tree.map(lambda x: x, _init(model.config))
    inner = params
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    with pytest.raises(UserError, match=message):
        model.apply({"params": params}, jnp.zeros((1, 2), jnp.int32))


def test_axes_follow_stacking_and_slicing():
    box = LogicalAxes(jnp.zeros((2, 3)), ("embed", "mlp"))
    stacked = box.add_axis(0, {nn.PARTITION_NAME: "layers"})
    assert stacked.names == ("layers", "embed", "mlp")
    assert stacked.remove_axis(0, {nn.PARTITION_NAME: "layers"}).names == ("embed", "mlp")
    assert box.replace_boxed(1.0) == LogicalAxes(1.0, ("embed", "mlp"))
    assert box.unbox() is box.value


def test_a_leaf_of_another_shape_is_read_as_it_is():
    class Module(nn.Module):
        @nn.compact
        def __call__(self):
            return weight(self, "kernel", nn.initializers.ones, (2, 3), ("embed", "mlp"))

    assert Module().apply({"params": {"kernel": "anything"}}) == "anything"
