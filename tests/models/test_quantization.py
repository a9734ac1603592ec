"""Models with 8-bit weights: what is rounded, what it saves, and that logits hardly move, in every family."""

import dataclasses
import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_huggingface_golden import NAMES, load, logits

from ml.checkpoint.pretrained import load_model, save_workdir
from ml.models import MoEConfig, Transformer, TransformerConfig, init_params, logical_axes, quantization
from ml.models.huggingface import save_pretrained
from ml.models.quantization import quantize_params
from ml.parallel import MeshConfig, Rules, make_mesh
from ml.weights import Int8, materialize, quantize

pytestmark = pytest.mark.usefixtures("quick_compilation")
QUICK = {"gemma2", "gpt2", "llama_llama3", "qwen3_moe"}
LLAMA_8B = TransformerConfig(
    vocab_size=128_256,
    num_layers=32,
    embed_dim=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=14_336,
)
GPT2 = TransformerConfig(
    vocab_size=50_257,
    num_layers=12,
    embed_dim=768,
    num_heads=12,
    num_kv_heads=12,
    head_dim=64,
    mlp_dim=3072,
    max_length=1024,
    gated_mlp=False,
    norm="layer",
    position_embedding="learned",
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    tie_embeddings=True,
)
TINY = TransformerConfig(vocab_size=32, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=24)
EXPERTS = dataclasses.replace(TINY, moe=MoEConfig(num_experts=4, top_k=2, mlp_dim=8), tie_embeddings=True)


def shapes(config):
    return jax.eval_shape(functools.partial(init_params, Transformer(config)), jax.random.key(0))


def params_of(config):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), jnp.float32), shapes(config))


def size(params):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("config", [LLAMA_8B, GPT2], ids=["llama", "gpt2"])
def test_a_model_takes_little_more_than_a_quarter(config):
    params = shapes(config)
    quantized = jax.eval_shape(functools.partial(quantize_params, config), params)
    assert 0.25 < size(quantized) / size(params) <= 0.26


def test_what_is_rounded_and_along_which_axes():
    config = dataclasses.replace(EXPERTS, qkv_bias=True, position_embedding="learned", max_length=8)
    quantized = jax.eval_shape(functools.partial(quantize_params, config), shapes(config))
    scales = jax.tree.map(
        lambda leaf: leaf.scale.shape if isinstance(leaf, Int8) else None,
        quantized,
        is_leaf=lambda leaf: isinstance(leaf, Int8),
    )
    layers = scales["layers"]
    attention, moe = layers["attention"], layers["moe"]
    assert attention["query"] == {"kernel": (2, 1, 4, 4), "bias": None}
    assert attention["key"]["kernel"] == attention["value"]["kernel"] == (2, 1, 2, 4)
    assert attention["out"]["kernel"] == (2, 1, 1, 16)
    assert moe["up"]["kernel"] == moe["gate"]["kernel"] == (2, 4, 1, 8)
    assert moe["down"]["kernel"] == (2, 4, 1, 16)
    assert moe["router"]["kernel"] is None
    assert scales["embed"]["embedding"] == (32, 1)
    assert scales["position"]["embedding"] is None
    assert jax.tree.leaves([layers["attention_norm"], layers["mlp_norm"], scales["final_norm"]]) == []
    untied = jax.eval_shape(functools.partial(quantize_params, TINY), shapes(TINY))
    assert untied["unembed"]["kernel"].scale.shape == (1, 32)
    assert untied["layers"]["mlp"]["down"]["kernel"].scale.shape == (2, 1, 16)


def test_floats_are_freed_as_they_are_rounded():
    params = params_of(EXPERTS)
    kept = quantize_params(EXPERTS, params)
    given = quantize_params(EXPERTS, params, donate=True)
    jax.tree.map(np.testing.assert_array_equal, kept, given)
    assert params["embed"]["embedding"].is_deleted() and params["layers"]["moe"]["up"]["kernel"].is_deleted()
    assert not params["layers"]["moe"]["router"]["kernel"].is_deleted()


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_logits_hardly_move(name):
    config, params, expected = load(name)
    quantized = quantize_params(config, params)
    assert size(quantized) < 0.4 * size(params)
    error = logits(config, quantized) - expected
    assert 0 < np.sqrt(np.square(error).mean()) <= 0.04 * expected.std()


@pytest.mark.parametrize("save, most", [(save_workdir, 1.05), (save_pretrained, 0.5)], ids=["workdir", "hf"])
def test_a_model_is_rounded_as_it_is_loaded(tmp_path, save, most, monkeypatch):
    params = params_of(TINY)
    save(tmp_path / "model", TINY, params)
    gc.collect()
    before, peak = {id(array) for array in jax.live_arrays()}, 0

    def watched(*arguments):
        nonlocal peak
        result = quantize(*arguments)
        peak = max(peak, sum(array.nbytes for array in jax.live_arrays() if id(array) not in before))
        return result

    monkeypatch.setattr(quantization, "quantize", watched)
    config, loaded, _ = load_model(tmp_path / "model", int8=True)
    assert config.num_layers == 2
    assert 0.3 * size(params) < peak < most * size(params), "floats and whole numbers together"
    jax.tree.map(np.testing.assert_array_equal, loaded, quantize_params(TINY, params))


def test_a_rounded_model_is_exported_as_what_it_stands_for(tmp_path):
    quantized = quantize_params(TINY, params_of(TINY))
    save_pretrained(tmp_path / "model", TINY, quantized)
    dense = jax.tree.map(materialize, quantized, is_leaf=lambda leaf: isinstance(leaf, Int8))
    jax.tree.map(np.testing.assert_array_equal, load_model(tmp_path / "model")[1], dense)


@pytest.mark.parametrize(
    "config, degrees",
    [
        (TINY, {"tensor": 2}),
        pytest.param(EXPERTS, {"expert": 2, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param(TINY, {"fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
    ],
    ids=["tensor", "experts", "fsdp"],
)
def test_a_model_on_a_mesh_is_rounded_where_it_lies(config, degrees):
    params, tokens = params_of(config), np.random.default_rng(0).integers(0, 32, (4, 6))
    rules = Rules(make_mesh(MeshConfig(data=1, **degrees), jax.devices()[: 2 * (len(degrees))]))
    expected = quantize_params(config, params)
    forward = jax.jit(lambda model, p: model.apply({"params": p}, tokens, method="forward"), static_argnums=0)
    with jax.set_mesh(rules.mesh):
        placed = jax.device_put(params, rules.shardings(logical_axes(config), params))
        quantized = quantize_params(config, placed)
        found = forward(Transformer(config, place=rules.spec), quantized)
    up = quantized["layers"]["mlp" if config.moe is None else "moe"]["up"]["kernel"]
    assert "tensor" in up.values.sharding.spec and "tensor" in up.scale.sharding.spec
    jax.tree.map(np.testing.assert_array_equal, quantized, expected)
    np.testing.assert_allclose(found, forward(Transformer(config), expected), atol=1e-5)
