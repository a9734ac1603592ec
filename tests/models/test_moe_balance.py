"""What keeps experts evenly loaded: whose frequencies enter the loss, what padding must not do, the router's bias."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from training_cases import MODELS, initial_params

from ml.models import MoEConfig, Transformer, TransformerConfig
from ml.models.moe import MoE, route, update_router_bias
from ml.parallel import MeshConfig, Rules, make_mesh

EXPERTS, TOP_K, EMBED, ROWS, LENGTH = 6, 2, 8, 8, 5


def config(**options):
    moe = MoEConfig(EXPERTS, TOP_K, 4, **options)
    return TransformerConfig(
        vocab_size=8, num_layers=1, embed_dim=EMBED, num_heads=1, num_kv_heads=1, head_dim=4, mlp_dim=4, moe=moe
    )


def case(model, seed=0):
    """A router with opinions, and rows that differ in what they want."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: MoE(model).init(jax.random.key(0), jnp.zeros((1, 1, EMBED))))["params"]
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), jnp.float32), meta.unbox(shapes))
    x = rng.normal(size=(ROWS, LENGTH, EMBED)) + 2 * rng.normal(size=(ROWS, 1, EMBED))
    return params, x.astype(np.float32), rng.random((ROWS, LENGTH)) < 0.7


def routed(params, x, valid):
    """Counts and summed probabilities of the tokens that count, in float64: ``[experts]`` each, and their number."""
    logits = x[valid].astype(np.float64) @ np.asarray(params["router"]["kernel"], np.float64)
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    chosen = np.argsort(-probabilities, axis=1)[:, :TOP_K]
    return np.bincount(chosen.ravel(), minlength=EXPERTS), probabilities.sum(axis=0), len(logits)


def loss_of(counts, total, tokens):
    return EXPERTS * (counts / counts.sum() * total / tokens).sum()


def test_shard_is_the_mean_over_devices_and_microbatch_is_whatever_the_mesh():
    rules = Rules(make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4]))
    balance = {}
    for over in ("shard", "microbatch"):
        model = config(balance_over=over)
        params, x, valid = case(model)
        with jax.set_mesh(rules.mesh):
            placed = jax.device_put(x, rules.sharding("batch", "length", None))
            flags = jax.device_put(valid, rules.sharding("batch", "length"))
            run = jax.jit(lambda p, x, v, model=model: MoE(model, place=rules.spec).apply({"params": p}, x, v)[1])
            stats = run(jax.device_put(params, rules.sharding()), placed, flags)
        np.testing.assert_array_equal(stats.counts, routed(params, x, valid)[0])
        balance[over] = float(stats.balance)
    parts = [loss_of(*routed(params, x[i : i + 2], valid[i : i + 2])) for i in range(0, ROWS, 2)]
    np.testing.assert_allclose(balance["shard"], np.mean(parts), rtol=1e-5)
    np.testing.assert_allclose(balance["microbatch"], loss_of(*routed(params, x, valid)), rtol=1e-5)
    assert balance["shard"] > 1.05 * balance["microbatch"]


def test_with_the_final_counts_the_mean_over_microbatches_is_the_loss_of_the_batch():
    """Demons in the Detail, section 3: ``f`` is a constant, so the loss is linear in ``P``; values and gradients."""
    layer = MoE(config(balance_over="batch"))
    params, x, valid = case(layer.config)
    parts = [slice(0, 3), slice(3, 4), slice(4, 8)]

    @jax.jit
    def balance(params, x, valid, earlier):
        stats = layer.apply({"params": params}, x, valid, earlier)[1]
        return stats.balance, stats.counts

    grad_of = jax.value_and_grad(balance, has_aux=True)
    (whole, total), gradient = grad_of(params, x, valid, jnp.zeros(EXPERTS, jnp.int32))
    value, slope = 0.0, jax.tree.map(jnp.zeros_like, gradient)
    for part in parts:
        own = balance(params, x[part], valid[part], jnp.zeros(EXPERTS, jnp.int32))[1]
        (each, _), of_part = grad_of(params, x[part], valid[part], total - own)
        share = valid[part].sum() / valid.sum()
        value += share * each
        slope = jax.tree.map(lambda a, b, share=share: a + share * b, slope, of_part)
    np.testing.assert_allclose(value, whole, rtol=1e-6)
    router = gradient["router"]["kernel"]
    np.testing.assert_allclose(slope["router"]["kernel"], router, atol=1e-6 * np.abs(router).max())
    np.testing.assert_allclose(whole, loss_of(*routed(params, x, valid)), rtol=1e-5)


def test_earlier_counts_enter_the_frequencies_of_batch_only():
    earlier = np.array([30, 0, 0, 5, 0, 1], np.int32)
    for over in ("shard", "microbatch", "batch"):
        layer = MoE(config(balance_over=over))
        params, x, valid = case(layer.config)
        own, total, tokens = routed(params, x, valid)
        stats = layer.apply({"params": params}, x, valid, earlier)[1]
        expected = loss_of(own + (earlier if over == "batch" else 0), total, tokens)
        np.testing.assert_allclose(stats.balance, expected, rtol=1e-5)
        np.testing.assert_array_equal(stats.counts, own)  # this microbatch's alone


@pytest.mark.parametrize("over", ["shard", "microbatch", "batch"])
def test_padding_is_in_no_count_and_no_probability(over):
    layer = MoE(config(balance_over=over))
    params, x, valid = case(layer.config)

    def stats(x, valid):
        return layer.apply({"params": params}, x, valid)[1]

    padded = stats(x, valid)
    other = stats(np.where(valid[..., None], x, -7 * x), valid)
    alone = stats(x[valid][None], None)
    for same in (other, alone):
        np.testing.assert_allclose(same.balance, padded.balance, rtol=1e-5)
        np.testing.assert_array_equal(same.counts, padded.counts)
    assert padded.counts.sum() == TOP_K * valid.sum()
    slope = jax.grad(lambda x: stats(x, valid).balance)(x)
    assert not np.abs(slope[~valid]).any() and np.abs(slope[valid]).all(axis=-1).all()
    assert stats(x, np.zeros_like(valid)).balance == 0


def test_layers_are_not_pooled():
    """Two layers, each of which overloads another expert, are not even together."""
    model = MODELS["moe"]
    params = initial_params(model)
    kernel = np.zeros_like(params["layers"]["moe"]["router"]["kernel"])
    params["layers"]["moe"]["router"]["kernel"] = kernel
    tokens = np.arange(24).reshape(2, 12)
    stats = jax.jit(Transformer(model).apply)({"params": params}, tokens)[2]
    # Ties go to the first experts: half of the probability lies on all the choices.
    np.testing.assert_array_equal(stats.counts, [[24, 24, 0, 0]] * 2)
    np.testing.assert_allclose(stats.balance, 1, rtol=1e-6)
    dense = jax.jit(Transformer(MODELS["dense"]).apply)({"params": initial_params(MODELS["dense"])}, tokens)[2]
    assert dense.balance == 0 and dense.counts.shape == (2, 0)


def test_the_bias_chooses_but_does_not_weigh():
    logits = np.log(np.array([[0.1, 0.5, 0.15, 0.25]], np.float32))
    moe = MoEConfig(4, 2, 8, normalize_top_k=False)
    top, chosen, _ = route(logits, moe, np.array([0.3, 0, 0, 0], np.float32))
    assert chosen.tolist() == [[1, 0]]
    np.testing.assert_allclose(top, [[0.5, 0.1]], rtol=1e-5)


def test_the_bias_has_no_gradient_and_starts_at_zero():
    layer = MoE(config(bias_update_rate=0.01))
    params, x, valid = case(layer.config)
    fresh = meta.unbox(layer.init(jax.random.key(0), x[:1, :1]))["params"]
    np.testing.assert_array_equal(fresh["router"]["bias"], np.zeros(EXPERTS))

    def loss(params):
        out, stats = layer.apply({"params": params}, x, valid)
        return (out**2).sum() + stats.balance

    gradient = jax.grad(loss)(params)
    assert not gradient["router"]["bias"].any() and gradient["router"]["kernel"].any()


def test_one_update_of_the_bias():
    bias = np.array([[0.0, 0.1, -0.1, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], np.float32)
    params = {"layers": {"moe": {"router": {"bias": bias, "kernel": 1}, "up": 2}, "norm": 3}, "embed": 4}
    counts = np.array([[10, 10, 0, 0], [7, 1, 0, 0], [7, 3, 0, 0]], np.int32)  # three layers
    after = update_router_bias(params, counts, 0.5)
    # The second layer's would have a mean of 0.25; of the third each expert is held against its own layer's mean.
    moved = np.array([[-0.5, -0.4, 0.4, 0.5], [-0.75, 0.25, 0.25, 0.25], [-0.5, -0.5, 0.5, 0.5]])
    np.testing.assert_allclose(after["layers"]["moe"]["router"]["bias"], moved, atol=1e-7)
    after["layers"]["moe"]["router"]["bias"] = bias
    assert after == params


def test_the_bias_drives_a_skewed_router_towards_balance():
    layer = MoE(config(bias_update_rate=0.02))
    params, x, _ = case(layer.config)
    rng = np.random.default_rng(1)
    params["router"]["bias"] = jnp.zeros(EXPERTS)
    params["router"]["kernel"] = jnp.asarray(0.2 * rng.normal(size=(EMBED, EXPERTS)), jnp.float32).at[0, 2].add(1.5)

    @jax.jit
    def step(bias, x):
        router = params["router"] | {"bias": bias}
        counts = layer.apply({"params": params | {"router": router}}, x)[1].counts
        tree = {"layers": {"moe": {"router": {"bias": bias[None]}}}}
        return update_router_bias(tree, counts[None], 0.02)["layers"]["moe"]["router"]["bias"][0], counts

    bias, loads = params["router"]["bias"], []
    for _ in range(60):
        x = rng.normal(size=(16, 16, EMBED)).astype(np.float32)
        x[..., 0] = np.abs(x[..., 0]) + 1
        bias, counts = step(bias, x)
        loads.append(np.asarray(counts) / counts.mean())
    assert loads[0].max() > 2.5  # of the 3 that are possible with 2 choices among 6
    assert np.mean(loads[-10:], axis=0).max() < 1.3
    np.testing.assert_allclose(bias.sum(), 0, atol=1e-5)


def test_a_negative_rate_is_refused():
    with pytest.raises(ValueError, match="bias_update_rate=-1"):
        MoEConfig(4, 2, 8, bias_update_rate=-1)
    assert dataclasses.replace(MoEConfig(4, 2, 8), bias_update_rate=0.1).bias_update_rate == 0.1
