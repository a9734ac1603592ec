"""The mixture-of-experts layer against a plain loop over tokens and experts in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from ml.models import MoEConfig, TransformerConfig
from ml.models.moe import MoE, route

EXPERTS, TOP_K, EMBED, WIDE = 4, 2, 12, 20


def _config(normalize=True, top_k=TOP_K):
    return TransformerConfig(
        vocab_size=8,
        num_layers=1,
        embed_dim=EMBED,
        num_heads=1,
        num_kv_heads=1,
        head_dim=4,
        mlp_dim=4,
        moe=MoEConfig(EXPERTS, top_k, WIDE, normalize_top_k=normalize),
        init_stddev=0.5,
    )


def _layer(config, seed=0):
    layer = MoE(config)
    return layer, meta.unbox(layer.init(jax.random.key(seed), jnp.zeros((1, 1, EMBED))))["params"]


def _inputs(seed=0):
    return np.random.default_rng(seed).normal(size=(2, 7, EMBED)).astype(np.float32)


def _softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def _loop(params, x, moe):
    """Output, and the pieces of the balancing loss: share of choices and mean probability per expert."""
    w = {name: np.asarray(params[name]["kernel"], np.float64) for name in ("router", "gate", "up", "down")}
    out, share, mean = np.zeros(x.shape), np.zeros(EXPERTS), np.zeros(EXPERTS)
    tokens = x.shape[0] * x.shape[1]
    for b, t in np.ndindex(*x.shape[:2]):
        token = x[b, t].astype(np.float64)
        probabilities = _softmax(token @ w["router"])
        mean += probabilities / tokens
        chosen = sorted(range(EXPERTS), key=lambda e: -probabilities[e])[: moe.top_k]
        total = sum(probabilities[e] for e in chosen) if moe.normalize_top_k else 1.0
        for e in chosen:
            share[e] += 1 / (tokens * moe.top_k)
            gate = token @ w["gate"][e]
            hidden = gate / (1 + np.exp(-gate)) * (token @ w["up"][e])
            out[b, t] += probabilities[e] / total * (hidden @ w["down"][e])
    return out, share, mean


@pytest.mark.sweep("True-2", "False-1")
@pytest.mark.parametrize(("normalize", "top_k"), [(True, 2), (False, 2), (False, 1), (True, 4)])
def test_equals_the_plain_loop(normalize, top_k):
    config = _config(normalize, top_k)
    layer, params = _layer(config)
    x = _inputs()
    out, stats = layer.apply({"params": params}, x)
    expected, share, mean = _loop(params, x, config.moe)
    assert expected.std() > 0.05
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(stats.balance, EXPERTS * (share * mean).sum(), rtol=1e-5)


def test_no_token_is_dropped_when_all_want_the_same_experts():
    config = _config()
    layer, params = _layer(config)
    x = np.abs(_inputs())
    router = np.zeros((EMBED, EXPERTS), np.float32)
    router[:, 2], router[:, 1] = 5.0, 2.0
    params["router"]["kernel"] = jnp.asarray(router)
    out, stats = layer.apply({"params": params}, x)
    expected, share, _ = _loop(params, x, config.moe)
    assert share.tolist() == pytest.approx([0, 0.5, 0.5, 0])
    np.testing.assert_allclose(out, expected, atol=1e-5)
    assert stats.balance == pytest.approx(EXPERTS * 0.5, rel=1e-3)


def test_gradients_are_finite_and_those_of_idle_experts_zero():
    config = _config()
    layer, params = _layer(config)
    x = np.abs(_inputs())
    params["router"]["kernel"] = jnp.zeros((EMBED, EXPERTS)).at[:, 0].set(30.0).at[:, 3].set(20.0)

    def loss(params, x):
        out, stats = layer.apply({"params": params}, x)
        return (out**2).sum() + stats.balance

    gradients, to_x = jax.grad(loss, argnums=(0, 1))(params, x)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((gradients, to_x)))
    for name in ("gate", "up", "down"):
        used = np.abs(gradients[name]["kernel"]).sum(axis=(1, 2)) > 0
        assert not used[[1, 2]].any()
        assert used[0]


def test_gradient_is_the_slope_of_the_loop():
    config = _config(normalize=False)
    layer, params = _layer(config)
    x = _inputs()
    rng = np.random.default_rng(5)
    weights = rng.normal(size=x.shape)
    direction = jax.tree.map(lambda w: rng.normal(size=w.shape), params)

    def loss(params):
        out, stats = layer.apply({"params": params}, x)
        return (weights * out).sum() + 3 * stats.balance

    gradients = jax.grad(loss)(params)
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), gradients, direction)))

    # The share of choices is held fixed: it carries no gradient, and a small enough step does not change it.
    def moved(step):
        moved = jax.tree.map(lambda w, d: np.asarray(w, np.float64) + step * d, params, direction)
        out, share, mean = _loop(moved, x, config.moe)
        return (weights * out).sum() + 3 * EXPERTS * (share * mean).sum()

    np.testing.assert_allclose(slope, (moved(1e-6) - moved(-1e-6)) / 2e-6, rtol=1e-4)


def test_balance_is_one_when_uniform():
    layer, params = _layer(_config())
    # Each token prefers another pair of experts: choices and mean probabilities are both even.
    x = np.zeros((1, EXPERTS, EMBED), np.float32)
    x[0, :, :EXPERTS] = 4 * np.eye(EXPERTS)
    router = np.zeros((EMBED, EXPERTS), np.float32)
    for i in range(EXPERTS):
        router[i, i], router[i, (i + 1) % EXPERTS] = 1.0, 0.5
    params["router"]["kernel"] = jnp.asarray(router)
    assert layer.apply({"params": params}, x)[1].balance == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
def test_route_weights(normalize):
    logits = np.log(np.array([[0.1, 0.5, 0.15, 0.25]], np.float32))
    top, chosen, probabilities = route(logits, MoEConfig(4, 2, 8, normalize_top_k=normalize))
    assert chosen.tolist() == [[1, 3]]
    np.testing.assert_allclose(top, [[2 / 3, 1 / 3]] if normalize else [[0.5, 0.25]], rtol=1e-5)
    np.testing.assert_allclose(probabilities, [[0.1, 0.5, 0.15, 0.25]], rtol=1e-5)


def test_routes_in_float32_whatever_the_activations():
    layer, params = _layer(_config())
    x = jnp.asarray(_inputs(), jnp.bfloat16)
    out, stats = layer.apply({"params": params}, x)
    assert (out.dtype, stats.balance.dtype) == (jnp.bfloat16, jnp.float32)
    logits = np.asarray(x, np.float64) @ np.asarray(params["router"]["kernel"], np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.argsort(-probabilities, axis=-1)[..., :TOP_K]
    share = np.bincount(chosen.ravel(), minlength=EXPERTS) / chosen.size
    expected = EXPERTS * (share * probabilities.mean((0, 1))).sum()
    assert stats.balance == pytest.approx(expected, rel=1e-5)


def test_config_refuses_more_choices_than_experts():
    with pytest.raises(ValueError, match="top_k=5"):
        MoEConfig(num_experts=4, top_k=5, mlp_dim=8)
