"""A model by its folder, whichever kind that is."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ml.checkpoint.pretrained import load_model, save_workdir
from ml.errors import UserError
from ml.models.huggingface import load_config, load_params

GOLDEN = Path(__file__).parents[1] / "models" / "golden"


@pytest.fixture(params=["hf", "workdir"])
def folder(request, tmp_path):
    source = GOLDEN / "gemma3_text"
    if request.param == "hf":
        return source
    config = load_config(source)
    save_workdir(tmp_path / "work", config, load_params(source, config))
    assert [path.name for path in tmp_path.iterdir()] == ["work"]
    return tmp_path / "work"


def test_both_kinds_give_the_same(folder):
    config, params, tokenizer = load_model(folder)
    expected = load_config(GOLDEN / "gemma3_text")
    assert config == expected and tokenizer is None
    jax.tree.map(np.testing.assert_array_equal, params, load_params(GOLDEN / "gemma3_text", expected))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}


def test_dtype_and_sharding(folder):
    mesh = jax.make_mesh((8,), ("fsdp",))

    def place(path):
        return NamedSharding(mesh, PartitionSpec("fsdp") if path == "embed/embedding" else PartitionSpec())

    _, params, _ = load_model(folder, dtype=jnp.float32, sharding=place)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    assert params["embed"]["embedding"].addressable_shards[0].data.shape == (12, 32)
    assert params["final_norm"]["scale"].sharding.is_fully_replicated


def test_neither_kind(tmp_path):
    with pytest.raises(UserError, match=r"neither experiment.json nor config.json"):
        load_model(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no checkpoint steps"):
        load_model(GOLDEN / "gemma2", step=3)
    experiment = tmp_path / "experiment.json"
    for text, expected in [
        ("{", "experiment.json:1: malformed"),
        ("{}", "no group 'model'"),
        (json.dumps({"model": {"vocab": 3}}), "model.vocab: no such key"),
    ]:
        experiment.write_text(text)
        with pytest.raises(UserError, match=expected):
            load_model(tmp_path)
