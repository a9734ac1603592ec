"""What strategies are told of a layer, and the strategy for training."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ml.models import SelfAttention, Transformer, TransformerConfig, init_params

CONFIG = TransformerConfig(
    vocab_size=29,
    num_layers=4,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    mlp_dim=24,
    init_stddev=0.3,
)
TOKENS = np.random.default_rng(0).integers(0, 29, (2, 12))


@flax.struct.dataclass
class Recorder:
    """A strategy that writes down, per layer, what it is told and given."""

    factor: jax.Array
    scales: list = flax.struct.field(pytree_node=False, default_factory=list)

    def attend(self, layer, query, key, value, state):
        self.scales.append((layer.scale, layer.softcap))
        window = -1 if layer.window is None else layer.window
        state = {
            "visits": state["visits"].at[layer.index].add(1),
            "window": state["window"].at[layer.index].set(window),
            "key": state["key"].at[layer.index].set(key),
        }
        return self.factor * query, state


def _record(config):
    model = Transformer(config)
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
    state = {
        "visits": jnp.zeros(config.num_layers, jnp.int32),
        "window": jnp.zeros(config.num_layers, jnp.int32),
        "key": jnp.zeros((config.num_layers, *TOKENS.shape, config.num_kv_heads, config.head_dim)),
    }
    recorder = Recorder(jnp.array(0.5))
    state = jax.jit(lambda params: model.apply({"params": params}, TOKENS, recorder, None, state)[1])(params)
    return state, recorder.scales


def test_state_is_carried_through_every_layer_once():
    state, scales = _record(CONFIG)
    assert state["visits"].tolist() == [1, 1, 1, 1]
    assert all(np.abs(state["key"][i] - state["key"][j]).max() > 0.01 for i in range(4) for j in range(i))
    assert set(scales) == {(CONFIG.head_dim**-0.5, None)}


@pytest.mark.parametrize(
    ("options", "windows"),
    [
        ({}, [-1] * 4),
        ({"sliding_window": 5}, [5] * 4),
        ({"sliding_window": 5, "window_pattern": ("local", "local", "global")}, [5, 5, 2**30 - 1, 5]),
        ({"sliding_window": 5, "window_pattern": ("local",)}, [5] * 4),
    ],
)
def test_each_layer_knows_its_window(options, windows):
    assert _record(dataclasses.replace(CONFIG, **options))[0]["window"].tolist() == windows


def test_each_layer_knows_scale_and_softcap():
    scales = _record(dataclasses.replace(CONFIG, attention_scale=0.3, attention_softcap=7.0))[1]
    assert set(scales) == {(0.3, 7.0)}


def _influence(config):
    """``[i, j]``: whether the hidden state at ``i`` changes when token ``j`` does."""
    model = Transformer(config)
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
    length = 10
    tokens = np.tile(np.arange(length), (length + 1, 1))
    tokens[np.arange(1, length + 1), np.arange(length)] = 28  # row j + 1 differs at j
    hidden = np.asarray(jax.jit(model.apply)({"params": params}, tokens)[0])
    return (np.abs(hidden[1:] - hidden[0]).max(-1) > 1e-6).T


def test_reach_of_causal_attention():
    distance = np.subtract.outer(np.arange(10), np.arange(10))
    np.testing.assert_array_equal(_influence(dataclasses.replace(CONFIG, num_layers=1)), distance >= 0)


@pytest.mark.sweep("3-6")
@pytest.mark.parametrize(("layers", "reach"), [(1, 2), (3, 6)])
def test_reach_of_sliding_windows_adds_up(layers, reach):
    distance = np.subtract.outer(np.arange(10), np.arange(10))
    config = dataclasses.replace(CONFIG, num_layers=layers, sliding_window=3)
    np.testing.assert_array_equal(_influence(config), (distance >= 0) & (distance <= reach))


def test_documents_of_a_row_do_not_see_each_other():
    rng = np.random.default_rng(1)
    query, key, value = (jnp.asarray(rng.normal(size=(1, 9, 2, 4)), jnp.float32) for _ in range(3))
    segments = jnp.array([[1, 1, 1, 1, 2, 2, 2, 0, 0]])
    config = dataclasses.replace(CONFIG, num_layers=1)
    assert config.num_layers == 1

    @flax.struct.dataclass
    class Layer:
        window: int | None = flax.struct.field(pytree_node=False, default=None)
        scale: float = flax.struct.field(pytree_node=False, default=0.5)
        softcap: float | None = flax.struct.field(pytree_node=False, default=None)

    out, state = SelfAttention(segments, implementation="xla").attend(Layer(), query, key, value, "passes through")
    assert state == "passes through"
    for part in (slice(0, 4), slice(4, 7), slice(7, 9)):
        alone, _ = SelfAttention().attend(Layer(), query[:, part], key[:, part], value[:, part], None)
        np.testing.assert_allclose(out[:, part], alone, atol=1e-6)


def test_segments_are_arguments_of_the_compiled_step():
    model = Transformer(CONFIG)
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
    traces = []

    @jax.jit
    def hidden(strategy):
        traces.append(1)
        return model.apply({"params": params}, TOKENS, strategy)[0]

    one = hidden(SelfAttention(jnp.ones(TOKENS.shape, jnp.int32)))
    two = hidden(SelfAttention(jnp.asarray(np.arange(12)[None] // 6 + 1 + 0 * TOKENS)))
    assert len(traces) == 1
    np.testing.assert_allclose(one[:, :6], two[:, :6], atol=1e-6)
    assert np.abs(one[:, 6:] - two[:, 6:]).max() > 0.1
