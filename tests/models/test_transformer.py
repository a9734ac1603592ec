"""The decoder as a whole: packing, blocks, remat, scanning, heads."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ml.models import REMAT_POLICIES, MoEConfig, SelfAttention, Transformer, TransformerConfig, init_params, rope
from ml.models.attention import AttentionLayer
from ml.models.layers import MLP, Attention, block_norm
from ml.models.transformer import Block, _PerLayer

CONFIG = TransformerConfig(
    vocab_size=37,
    num_layers=3,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=24,
    max_length=20,
    init_stddev=0.3,
)
TOKENS = np.random.default_rng(0).integers(0, 37, (2, 10))


@functools.cache
def _params(config):
    return jax.jit(init_params, static_argnums=0)(Transformer(config), jax.random.key(3))


def _forward(config, tokens, params=None, **kwargs):
    forward = jax.jit(functools.partial(Transformer(config).apply, method="forward"))
    return np.asarray(forward({"params": _params(config) if params is None else params}, tokens, **kwargs))


@pytest.mark.sweep("windows")
@pytest.mark.parametrize(
    "options",
    [
        {"sliding_window": 3, "window_pattern": ("local", "global"), "local_rope_theta": 50.0},
        {"position_embedding": "learned", "moe": MoEConfig(num_experts=4, top_k=2, mlp_dim=8)},
    ],
    ids=["windows", "learned_positions_and_experts"],
)
def test_packed_documents_equal_documents_alone(options):
    config = dataclasses.replace(CONFIG, **options)
    lengths = [5, 1, 8, 3]
    rng = np.random.default_rng(1)
    documents = [rng.integers(0, 37, n) for n in lengths]
    packed = np.zeros((1, 20), np.int32)
    segments, positions = np.zeros_like(packed), np.zeros_like(packed)
    alone = np.zeros((4, 20), np.int32)  # padded on the right, which no real token sees
    start = 0
    for i, document in enumerate(documents):
        part = slice(start, start + len(document))
        packed[0, part], segments[0, part], positions[0, part] = document, i + 1, np.arange(len(document))
        alone[i, : len(document)] = document
        start = part.stop
    together = _forward(config, packed, strategy=SelfAttention(jnp.asarray(segments)), positions=positions)[0]
    separate = _forward(config, alone)
    expected = np.concatenate([separate[i, :n] for i, n in enumerate(lengths)])
    assert expected.std() > 0.3
    np.testing.assert_allclose(together[: sum(lengths)], expected, atol=1e-4)


def _by_hand(config, params, tokens):
    """Blocks written out one by one, with the layers' own modules on slices of the stacked parameters."""
    x = params["embed"]["embedding"][tokens]
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    rotation = rope.rotation(positions, config.rope, config.head_dim)
    for i in range(config.num_layers):
        p = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
        layer = AttentionLayer(i, None, config.head_dim**-0.5, None)

        def norm(name, x, p=p):
            return block_norm(config).apply({"params": p[name]}, x)

        def attention(x, p=p, layer=layer):
            return Attention(config).apply({"params": p["attention"]}, x, layer, SelfAttention(), rotation, None)[0]

        def mlp(x, p=p):
            return MLP(config).apply({"params": p["mlp"]}, x)

        if config.parallel_block:
            normed = norm("attention_norm", x)
            x = x + attention(normed) + mlp(normed)
        else:
            x = x + attention(norm("attention_norm", x))
            x = x + mlp(norm("mlp_norm", x))
    x = block_norm(config).apply({"params": params["final_norm"]}, x)
    return x @ params["unembed"]["kernel"]


@pytest.mark.sweep("True")
@pytest.mark.parametrize("parallel", [False, True])
def test_serial_and_parallel_blocks_by_hand(parallel):
    config = dataclasses.replace(CONFIG, parallel_block=parallel)
    params = _params(config)
    assert ("mlp_norm" in params["layers"]) != parallel
    np.testing.assert_allclose(
        _forward(config, TOKENS), jax.jit(_by_hand, static_argnums=0)(config, params, TOKENS), atol=1e-4
    )


def test_parallel_block_is_another_function_than_the_serial():
    params = _params(CONFIG)
    parallel = dataclasses.replace(CONFIG, parallel_block=True)
    with_one_norm = params | {"layers": {k: v for k, v in params["layers"].items() if k != "mlp_norm"}}
    difference = _forward(CONFIG, TOKENS) - _forward(parallel, TOKENS, with_one_norm)
    assert difference.std() > 0.1


def test_scanned_layers_equal_a_loop_over_blocks():
    config = dataclasses.replace(
        CONFIG,
        sliding_window=3,
        window_pattern=("local", "global"),
        local_rope_theta=50.0,
        moe=MoEConfig(num_experts=4, top_k=2, mlp_dim=8),
    )
    params = _params(config)

    @jax.jit
    def loop(params):
        positions = jnp.broadcast_to(jnp.arange(10), TOKENS.shape)
        local = dataclasses.replace(config.rope, theta=50.0)
        rotations = tuple(rope.rotation(positions, r, config.head_dim) for r in (config.rope, local))
        carry, counts = (params["embed"]["embedding"][TOKENS], None, jnp.zeros(())), []
        for i, is_local in enumerate([True, False, True]):
            layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
            per_layer = _PerLayer(jnp.array(i), jnp.array(is_local))
            carry, used = Block(config).apply({"params": layer}, carry, per_layer, SelfAttention(), rotations)
            counts.append(used)
        hidden = block_norm(config).apply({"params": params["final_norm"]}, carry[0])
        return hidden, carry[2] / 3, jnp.stack(counts)

    model = Transformer(config)
    hidden, _, stats = jax.jit(model.apply)({"params": params}, TOKENS)
    expected = loop(params)
    np.testing.assert_allclose(hidden, expected[0], atol=1e-4)
    np.testing.assert_allclose(stats.balance, expected[1], rtol=1e-5)
    np.testing.assert_array_equal(stats.counts, expected[2])


def test_remat_policies_give_the_same_gradients_and_less_is_kept():
    params = _params(CONFIG)

    def loss(params, remat):
        logits = Transformer(CONFIG, remat=remat).apply({"params": params}, TOKENS, method="forward")
        return jnp.square(logits).mean()

    gradients = {remat: jax.jit(jax.grad(loss), static_argnums=1)(params, remat) for remat in REMAT_POLICIES}
    for remat in REMAT_POLICIES:
        for ours, plain in zip(*map(jax.tree.leaves, (gradients[remat], gradients["none"])), strict=True):
            assert np.abs(plain).max() > 1e-6
            np.testing.assert_allclose(ours, plain, rtol=1e-3, atol=1e-6)

    def kept(remat):
        saved = jax.eval_shape(lambda p: jax.vjp(lambda p: loss(p, remat), p)[1], params)
        return sum(leaf.size for leaf in jax.tree.leaves(saved))

    sizes = [kept(remat) for remat in ("full", "dots_no_batch", "dots", "none")]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[1] <= sizes[2] < sizes[3]


def test_learned_positions_are_added():
    config = dataclasses.replace(CONFIG, position_embedding="learned")
    params = _params(config)
    table = params["position"]["embedding"]
    positions = np.array([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3]] * 2)
    # Token embeddings that already hold the position, and a table of zeros.
    embedding = np.concatenate([np.asarray(params["embed"]["embedding"])[row] for row in TOKENS])
    moved = params | {
        "embed": {"embedding": jnp.asarray(embedding + np.asarray(table)[positions.ravel()])},
        "position": {"embedding": jnp.zeros_like(table)},
    }
    other = dataclasses.replace(config, vocab_size=20)
    hidden = _forward(config, TOKENS, positions=positions)
    expected = _forward(other, np.arange(20).reshape(2, 10), moved)
    np.testing.assert_allclose(hidden, expected, atol=1e-5)


def test_rotary_positions_are_relative():
    near, far = (np.broadcast_to(np.arange(10) + shift, TOKENS.shape) for shift in (0, 500))
    np.testing.assert_allclose(
        _forward(CONFIG, TOKENS, positions=near), _forward(CONFIG, TOKENS, positions=far), atol=1e-3
    )
    stretched = _forward(CONFIG, TOKENS, positions=2 * near)
    assert np.abs(stretched - _forward(CONFIG, TOKENS)).max() > 0.1


@pytest.mark.parametrize(("pattern", "theta"), [(("local",), 50.0), (("global",), 10_000.0)])
def test_local_layers_have_a_rotary_base_of_their_own(pattern, theta):
    params = _params(CONFIG)
    wide = {"sliding_window": 20, "window_pattern": pattern, "local_rope_theta": 50.0}  # a window that hides nothing
    same = dataclasses.replace(CONFIG, rope=dataclasses.replace(CONFIG.rope, theta=theta))
    actual = _forward(dataclasses.replace(CONFIG, **wide), TOKENS, params)
    np.testing.assert_allclose(actual, _forward(same, TOKENS, params), atol=1e-4)


def test_default_positions_count_from_zero():
    positions = np.broadcast_to(np.arange(10), TOKENS.shape)
    np.testing.assert_array_equal(_forward(CONFIG, TOKENS), _forward(CONFIG, TOKENS, positions=positions))


def test_final_softcap_bounds_logits():
    plain = 5 * _forward(dataclasses.replace(CONFIG), TOKENS)
    params = _params(CONFIG)
    params = params | {"unembed": {"kernel": 5 * params["unembed"]["kernel"]}}
    capped = _forward(dataclasses.replace(CONFIG, final_softcap=4.0), TOKENS, params)
    assert np.abs(plain).max() > 8
    np.testing.assert_allclose(capped, 4 * np.tanh(plain / 4), atol=1e-4)


def test_scaled_embedding():
    params = _params(CONFIG)
    scaled = params | {"embed": {"embedding": 4.0 * params["embed"]["embedding"]}}  # sqrt(16)
    expected = _forward(CONFIG, TOKENS, scaled)
    np.testing.assert_allclose(_forward(dataclasses.replace(CONFIG, scale_embedding=True), TOKENS), expected, atol=1e-5)


def test_bfloat16_activations_float32_logits():
    model = Transformer(CONFIG, dtype=jnp.bfloat16)
    hidden = jax.jit(model.apply)({"params": _params(CONFIG)}, TOKENS)[0]
    logits = model.apply({"params": _params(CONFIG)}, hidden, method="logits")
    assert (hidden.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    exact = _forward(CONFIG, TOKENS)
    assert np.sqrt(np.mean((logits - exact) ** 2)) < 0.05 * exact.std()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kv_heads": 3}, "not a multiple"),
        ({"head_dim": 7}, "must be even"),
        ({"window_pattern": ("local",)}, "sliding_window is not"),
        ({"sliding_window": 4, "window_pattern": ("locl",)}, "locl"),
    ],
)
def test_architectures_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **options)
