"""The examples of docs/guides/adding_a_method.md are run: each is put where the guide says, and does what it says."""

import dataclasses
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pages import ROOT, fences
from training_cases import MODELS, initial_params, ragged_batch

import ml.data.sources
import ml.optim
import ml.studies
import ml.train.objective
from ml.data import SourceConfig
from ml.errors import UserError
from ml.models import SelfAttention, TransformerConfig, module_of
from ml.models.huggingface import families, parse_config, read_config
from ml.optim import OptimizerConfig, ScheduleConfig, make_optimizer
from ml.studies.registry import load, studies
from ml.train.config import TrainConfig
from ml.train.state import TrainState
from ml.train.step import make_train_step

pytestmark = pytest.mark.usefixtures("quick_compilation")
CODE = {code.splitlines()[0]: code for code in fences(ROOT / "docs/guides/adding_a_method.md", "python")}


def example(place):
    """Runs the example whose first line says that it belongs there."""
    names = {"__name__": __name__}
    exec(compile(CODE[f"# {place}"], place, "exec"), names)
    return names


def test_an_optimizer(monkeypatch):
    signum = example("ml/optim/signum.py")["signum"]
    monkeypatch.setattr(ml.optim, "OPTIMIZERS", {**ml.optim.OPTIMIZERS, "signum": signum})
    config = OptimizerConfig("signum", 0.5, weight_decay=0.1, options={"momentum": 0.8})
    params = {"kernel": np.array([[1.0, -2.0]], np.float32), "bias": np.array([3.0], np.float32)}
    axes = {"kernel": ("embed", "mlp"), "bias": ("mlp",)}
    tx, _ = make_optimizer(config, ScheduleConfig(kind="constant"), total_steps=2, batch_size=1, axes=axes)
    state = tx.init(params)
    for gradient, expected in ((1.0, -0.5), (-0.7, -0.5), (-0.2, 0.5)):  # the momentum is 1, 0.1, -0.12
        updates, state = tx.update(jax.tree.map(lambda x, g=gradient: jnp.full_like(x, g), params), state, params)
        np.testing.assert_allclose(updates["bias"], [expected], rtol=1e-6)
        np.testing.assert_allclose(updates["kernel"], [[expected - 0.05, expected + 0.1]], rtol=1e-6)
    with pytest.raises(UserError, match="did you mean 'momentum'"):
        OptimizerConfig("signum", 0.5, options={"momentun": 0.8})


def test_an_objective(monkeypatch):
    make = example("ml/train/smoothed_loss.py")["make_smoothed_objective"]
    model, params = module_of(MODELS["dense"]), jax.device_put(initial_params(MODELS["dense"]))
    batch = ragged_batch(4)
    total, metrics = jax.jit(make(model, TrainConfig(attention="reference")).loss)(params, batch)
    hidden = model.apply({"params": params}, batch["tokens"], SelfAttention(batch["segment_ids"]), batch["positions"])
    logits = np.asarray(model.apply({"params": params}, hidden[0], method="logits"), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
    expected = ((0.9 * nll - 0.1 * log_p.mean(-1)) * batch["loss_mask"]).sum()
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], (nll * batch["loss_mask"]).sum(), rtol=1e-5)

    # And the train step takes it, cut into microbatches.
    monkeypatch.setattr(ml.train.objective, "OBJECTIVES", {type(model): make})
    config = TrainConfig(batch_size=4, microbatches=2, attention="reference")
    tx, schedule = make_optimizer(
        OptimizerConfig("sgd", 0.1),
        ScheduleConfig(kind="constant"),
        total_steps=1,
        batch_size=4,
        axes=jax.tree.map(lambda x: ("embed",) * x.ndim, params),
    )
    state = TrainState(jnp.int32(0), params, tx.init(params), None, jnp.int32(0))
    parts = {name: value.reshape(2, 2, *value.shape[1:]) for name, value in batch.items()}
    _, metrics = jax.jit(make_train_step(model, tx, schedule, config))(state, parts)
    np.testing.assert_allclose(metrics["objective"], expected / batch["loss_mask"].sum(), rtol=1e-5)


def test_a_data_source(monkeypatch, tmp_path):
    read = example("in ml/data/sources.py")["read_csv"]
    monkeypatch.setitem(ml.data.sources._READERS, "csv", ((".csv",), read))
    (tmp_path / "a.csv").write_text('text,label\n"one, with a comma",x\n,y\n"two\nlines",\n')
    source = ml.data.sources.Source(SourceConfig(kind="csv", path=str(tmp_path)))
    assert [(d.text, d.label) for d in source.documents()] == [("one, with a comma", "x"), ("two\nlines", "")]
    with pytest.raises(UserError, match=r"text_field: .*a.csv has no column 'texts'; did you mean 'text'"):
        list(ml.data.sources.Source(dataclasses.replace(source.config, text_field="texts")).documents())


def test_a_way_to_attend():
    attention = example("ml/models/prefix_attention.py")["PrefixAttention"]
    config = dataclasses.replace(MODELS["dense"], num_kv_heads=1)
    model, params = module_of(config), jax.device_put(initial_params(config))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (3, 8))

    def hidden(strategy):
        return jax.jit(lambda s: model.apply({"params": params}, tokens, s)[0])(strategy)

    mixed = hidden(attention(jnp.array([0, 8, 4])))
    causal, both = hidden(SelfAttention()), hidden(SelfAttention(causal=False))
    np.testing.assert_allclose(mixed[0], causal[0], atol=1e-5)
    np.testing.assert_allclose(mixed[1], both[1], atol=1e-5)
    assert np.abs(mixed[2] - causal[2]).max() > 1e-2 and np.abs(mixed[2] - both[2]).max() > 1e-2


def test_a_model_family(monkeypatch):
    names = example("in ml/models/huggingface/")
    monkeypatch.setitem(families.ARCHITECTURES, "seed_oss", names["ARCHITECTURE"])
    monkeypatch.setitem(families.DEFAULTS, "seed_oss", names["DEFAULTS"])
    monkeypatch.setitem(read_config.READERS, "seed_oss", names["read_seed_oss"])
    values = {
        "model_type": "seed_oss",
        "architectures": ["SeedOssForCausalLM"],
        "vocab_size": 155_136,
        "hidden_size": 5120,
        "intermediate_size": 27_648,
        "num_hidden_layers": 64,
        "num_attention_heads": 80,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "attention_bias": True,
        "attention_out_bias": False,
        "max_position_embeddings": 524_288,
        "rope_theta": 1e7,
    }
    family, config = parse_config(values)
    assert family == "seed_oss" and isinstance(config, TransformerConfig)
    assert (config.qkv_bias, config.out_bias, config.head_dim, config.rope.theta) == (True, False, 128, 1e7)
    with pytest.raises(UserError, match="residual_scale is not a field that seed_oss is known to have"):
        parse_config(values | {"residual_scale": 2.0})


def test_a_study(monkeypatch, tmp_path):
    (tmp_path / "scale_of_gradients.py").write_text(CODE["# ml/studies/scale_of_gradients.py"])
    monkeypatch.setattr(ml.studies, "__path__", [*ml.studies.__path__, str(tmp_path)])
    assert "scale_of_gradients" in studies()
    outcome = load("scale_of_gradients")("cpu")
    monkeypatch.delitem(sys.modules, "ml.studies.scale_of_gradients")
    assert outcome.holds and math.isclose(outcome.baseline.mean, 1000, rel_tol=1e-4)


def test_all_examples_are_run():
    places = ("ml/optim/signum.py", "ml/train/smoothed_loss.py", "in ml/data/sources.py")
    places += ("ml/models/prefix_attention.py", "in ml/models/huggingface/", "ml/studies/scale_of_gradients.py")
    assert set(CODE) == {f"# {place}" for place in places}
