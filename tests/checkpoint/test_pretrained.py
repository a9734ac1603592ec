"""A model by its folder, whichever kind that is."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ml.checkpoint import Checkpointer
from ml.checkpoint.pretrained import load_model, save_workdir
from ml.config import to_dict
from ml.errors import UserError
from ml.models import Transformer, TransformerConfig, init_params, logical_axes
from ml.models.huggingface import load_config, load_params
from ml.optim import OptimizerConfig, ScheduleConfig, eval_params, make_optimizer

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


@pytest.mark.parametrize("name", ["schedule_free_adamw", "schedule_free_sgd"])
def test_a_schedule_free_run_is_read_at_its_average(tmp_path, name):
    config = TransformerConfig(
        vocab_size=13, num_layers=2, embed_dim=8, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=12, max_length=16
    )
    optimizer = OptimizerConfig(name, learning_rate=0.1, clip_norm=1.0)
    tx, _ = make_optimizer(
        optimizer, ScheduleConfig(kind="constant"), total_steps=9, batch_size=1, axes=logical_axes(config)
    )
    params = init_params(Transformer(config), jax.random.key(0))
    state = jax.jit(tx.init)(params)
    for _ in range(3):
        updates, state = tx.update(jax.tree.map(lambda x: x + 0.1, params), state, params)
        params = jax.tree.map(jnp.add, params, updates)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, {"params": params, "opt_state": state}, None, force=True)
    experiment = {"model": to_dict(config), "optimizer": {"name": name}}
    (tmp_path / "experiment.json").write_text(json.dumps(experiment))
    loaded = load_model(tmp_path)[1]
    average = eval_params(optimizer, state, params)
    assert float(jnp.abs(average["embed"]["embedding"] - params["embed"]["embedding"]).max()) > 5e-5
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), loaded, average)
    halves = load_model(tmp_path, dtype=jnp.bfloat16)[1]
    assert halves["embed"]["embedding"].dtype == jnp.bfloat16


def test_a_run_with_a_moving_average_is_read_at_it(tmp_path):
    config = TransformerConfig(
        vocab_size=13, num_layers=2, embed_dim=8, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=12, max_length=16
    )
    params = init_params(Transformer(config), jax.random.key(0))
    average = jax.tree.map(lambda x: x + 1, params)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, {"params": params, "ema": average}, None, force=True)
    (tmp_path / "experiment.json").write_text(json.dumps({"model": to_dict(config), "train": {"ema": 0.9}}))
    jax.tree.map(np.testing.assert_array_equal, load_model(tmp_path)[1], average)
