"""The encoder: who sees whom, what its heads read, and that its parameters are what cost and names say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_cases import initial_params

from ml.errors import UserError
from ml.models import EncoderConfig, SelfAttention, Transformer, bert_config, head_params, init_params, logical_axes
from ml.models import module_of as module
from ml.models.cost import forward_flops_per_token, parameter_count
from ml.models.huggingface.names import leaf_shapes
from ml.models.huggingface.write_config import write_config
from ml.plan.flops import computed_flops

CONFIG = bert_config(vocab_size=64, num_layers=2, embed_dim=16, num_heads=2, mlp_dim=32, max_length=16)
CLASSIFIER = dataclasses.replace(CONFIG, encoder=EncoderConfig(num_classes=3))
OF_MEANS = dataclasses.replace(CONFIG, encoder=EncoderConfig(num_classes=3, pooling="mean"))
LENGTH = 8


def shapes(config):
    return jax.eval_shape(lambda: init_params(module(config), jax.random.key(0)))


@pytest.fixture(scope="module")
def hidden():
    """``(tokens, segment_ids, token_types) -> hidden states``."""
    params = jax.tree.map(jnp.asarray, initial_params(CONFIG))

    @jax.jit
    def run(tokens, segments, types):
        strategy = SelfAttention(segments, causal=False)
        return module(CONFIG).apply({"params": params}, tokens, strategy, types)[0]

    return lambda *arrays: np.asarray(run(*(jnp.asarray(x, jnp.int32) for x in arrays)))


def test_every_token_sees_its_whole_row_and_no_padding(hidden):
    tokens = np.arange(1, 2 * LENGTH + 1).reshape(2, LENGTH)
    segments = np.ones((2, LENGTH))
    segments[1, 5:] = 0
    types = np.zeros((2, LENGTH))
    before = hidden(tokens, segments, types)
    last, padding = tokens.copy(), tokens.copy()
    last[0, -1] += 20
    padding[1, 5:] += 20
    assert (np.abs(hidden(last, segments, types) - before)[0] > 1e-4).any(axis=-1).all()
    assert np.abs(hidden(padding, segments, types) - before)[1, :5].max() < 1e-6
    second = types.copy()
    second[:, 4:] = 1
    assert (np.abs(hidden(tokens, segments, second) - before)[0] > 1e-4).any(axis=-1).all()


@pytest.mark.parametrize("config", [CONFIG, CLASSIFIER, OF_MEANS], ids=["pretraining", "classifier", "mean"])
def test_parameters_are_what_names_axes_and_cost_say(config):
    made = {"/".join(key.key for key in path): leaf for path, leaf in jax.tree.leaves_with_path(shapes(config))}
    assert {path: leaf.shape for path, leaf in made.items()} == leaf_shapes(config)
    assert parameter_count(config).total == sum(leaf.size for leaf in made.values())
    axes = logical_axes(config)
    jax.tree.map(lambda names, leaf: len(names) == leaf.ndim or pytest.fail(str(names)), axes, shapes(config),
                 is_leaf=lambda x: isinstance(x, tuple))  # fmt: skip


def test_flops_are_those_of_the_program():
    """The formula leaves out the pooler and the two small heads, which one token in a row has."""

    def run(params, tokens):
        out, _ = module(CONFIG).apply(
            {"params": params}, tokens, SelfAttention(implementation="reference", causal=False)
        )
        return module(CONFIG).apply({"params": head_params(CONFIG, params)}, out[:, :3], method="logits")

    jaxpr = jax.make_jaxpr(run)(shapes(CONFIG), jax.ShapeDtypeStruct((4, LENGTH), jnp.int32))
    assert computed_flops(jaxpr) == pytest.approx(4 * LENGTH * forward_flops_per_token(CONFIG, LENGTH, 3), rel=1e-6)


@pytest.mark.slow
def test_kernels_begin_as_the_paper_says():
    drawn = jax.jit(lambda key: init_params(module(CONFIG), key)["layers"]["attention"])(jax.random.key(0))
    for name in ("query", "out"):
        assert np.std(drawn[name]["kernel"]) == pytest.approx(0.02, rel=0.2)


def test_a_mean_is_that_of_the_text_without_its_padding():
    rng = np.random.default_rng(0)
    hidden, segments = rng.normal(size=(2, LENGTH, 16)).astype(np.float32), np.ones((2, LENGTH), np.int32)
    segments[1, 5:] = 0
    kernel, bias = rng.normal(size=(16, 3)), rng.normal(size=3)
    params = {"classifier": {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}}
    logits = module(OF_MEANS).apply({"params": params}, hidden, segments, method="class_logits")
    means = np.stack([hidden[0].mean(axis=0, dtype=np.float64), hidden[1, :5].mean(axis=0, dtype=np.float64)])
    assert np.abs(logits - (means @ kernel + bias)).max() < 1e-5
    unpadded = module(OF_MEANS).apply({"params": params}, hidden, method="class_logits")
    assert np.abs(unpadded - (hidden.mean(axis=1, dtype=np.float64) @ kernel + bias)).max() < 1e-5


def test_a_mean_is_for_classifiers_and_has_no_form_at_hugging_face():
    with pytest.raises(ValueError, match="pooling='mean' is for classifiers: set num_classes"):
        EncoderConfig(pooling="mean")
    with pytest.raises(ValueError, match="pooling='max' is none of first, mean"):
        EncoderConfig(num_classes=2, pooling="max")
    with pytest.raises(UserError, match=r"or fine-tune one with encoder\.pooling=first"):
        write_config(OF_MEANS)


def test_an_encoder_is_no_decoder():
    with pytest.raises(UserError, match="encoder"):
        Transformer(CONFIG).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    with pytest.raises(ValueError, match="tie_embeddings=False is not what an encoder has"):
        dataclasses.replace(CONFIG, tie_embeddings=False)
