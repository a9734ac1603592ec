"""Logits of committed tiny models against those that transformers computed (scripts/make_golden.py), without torch."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ml.models import RopeConfig, TransformerConfig, init_params, module_of
from ml.models.huggingface import canonical, load_config, load_params, save_pretrained
from ml.models.huggingface.names import leaf_shapes

GOLDEN = Path(__file__).parent / "golden"
LENGTH = json.loads((GOLDEN / "made_by.json").read_text())["length"]
NAMES = sorted(path.parent.name for path in GOLDEN.glob("*/logits.npy"))
# Written out, so that a family cannot drop out of the folder unnoticed.
FAMILIES = {"llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "gemma", "gemma2", "gemma3_text"}
FAMILIES |= {"gpt2", "bert"}


def tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 96, (1, LENGTH), dtype=np.int32)


def logits(config: TransformerConfig, params: dict) -> np.ndarray:
    apply = jax.jit(lambda p, t: module_of(config).apply({"params": p}, t, method="forward"))
    return np.asarray(apply(params, tokens()))


def load(name: str) -> tuple[TransformerConfig, dict, np.ndarray]:
    folder = GOLDEN / name
    config = load_config(folder)
    return config, load_params(folder, config, dtype=jnp.float32), np.load(folder / "logits.npy")


def test_every_family_is_there():
    assert {json.loads((GOLDEN / name / "config.json").read_text())["model_type"] for name in NAMES} == FAMILIES


@pytest.mark.parametrize("name", NAMES)
def test_logits(name):
    config, params, expected = load(name)
    assert expected.shape == (1, LENGTH, 96)
    assert expected.std() > 1.0, "logits of natural scale, or the tolerance would mean nothing"
    assert np.abs(logits(config, params) - expected).max() <= 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_tree_is_the_one_the_model_makes(name):
    config, params, _ = load(name)
    made = jax.eval_shape(lambda: init_params(module_of(config), jax.random.key(0)))
    made_shapes = sorted(leaf.shape for leaf in jax.tree.leaves(made))
    assert sorted(leaf.shape for leaf in jax.tree.leaves(params)) == made_shapes
    assert sorted(leaf_shapes(config).values()) == made_shapes


# What each golden model is there for, taken away: the logits must move far beyond the tolerance.
ABLATIONS = {
    "llama_llama3": {"rope": RopeConfig(theta=1000.0)},
    "llama_yarn": {"rope": RopeConfig(theta=1000.0)},
    "mistral": {"sliding_window": None},
    "qwen2": {"qkv_bias": False},
    "qwen3": {"qk_norm": False},
    "gemma": {"scale_embedding": False},
    "gemma2": {"attention_softcap": None},
    "gemma3_text": {"local_rope_theta": None},
    "gpt2": {"activation": "gelu"},
    "bert": {"norm_eps": 0.1},
}


@pytest.mark.sweep("bert", "gemma2", "llama_llama3", "qwen3")
@pytest.mark.parametrize("name", sorted(ABLATIONS))
def test_golden_logits_depend_on_the_option(name):
    config, params, expected = load(name)
    without = dataclasses.replace(config, **ABLATIONS[name])
    floor = 1e-3 if name == "gpt2" else 0.1  # the two GELUs differ by at most 5e-4 each
    assert np.abs(logits(without, params) - expected).max() > floor


@pytest.mark.parametrize("name", NAMES)
def test_export_then_import_is_the_identity(name, tmp_path):
    config = load_config(GOLDEN / name)
    params = load_params(GOLDEN / name, config)
    save_pretrained(tmp_path / "out", config, params)
    again = load_config(tmp_path / "out")
    assert canonical(again) == canonical(config)
    restored = load_params(tmp_path / "out", again)
    assert jax.tree.structure(restored) == jax.tree.structure(params)
    for new, old in zip(jax.tree.leaves(restored), jax.tree.leaves(params), strict=True):
        assert new.dtype == old.dtype == jnp.bfloat16
        np.testing.assert_array_equal(new, old)
