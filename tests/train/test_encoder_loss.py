"""An encoder's step: its gradient and reports, that cutting the batch changes nothing, and a run with a break."""

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from training_cases import initial_params, write_corpus

from ml.checkpoint import Checkpointer
from ml.checkpoint.params import restore_params
from ml.config import build, to_dict
from ml.data import DataConfig, LabelledConfig, MaskedConfig, SourceConfig, TokenizerConfig
from ml.errors import UserError
from ml.models import EncoderConfig, SelfAttention, bert_config, logical_axes, module_of
from ml.models.bert import Dropout
from ml.optim import OptimizerConfig, ScheduleConfig, make_optimizer
from ml.parallel import MeshConfig, Rules, place_batch
from ml.plan.program import assemble
from ml.train.base import base
from ml.train.config import ExperimentConfig, TrainConfig
from ml.train.evaluation import make_evaluate
from ml.train.loop import train
from ml.train.objective import make_objective
from ml.train.objective_class import dropout_keys
from ml.train.reporting import print_report, read_metrics
from ml.train.setup import check_fit, make_parts, make_state
from ml.train.state import TrainState
from ml.train.step import make_train_step
from ml.train.summary import summarize
from ml.train.workdir import Workdir

pytestmark = pytest.mark.usefixtures("quick_compilation")
MODEL = bert_config(vocab_size=64, num_layers=2, embed_dim=16, num_heads=2, mlp_dim=32, max_length=16)
ROWS, LENGTH, PREDICTIONS = 8, 16, 4
PAIRS = DataConfig(sequence_length=LENGTH, masked=MaskedConfig(max_predictions=PREDICTIONS))
GRADIENT = OptimizerConfig("sgd", 1.0, options={"momentum": 0.0})


def make_batch(seed=0):
    """Rows ever shorter, the last of them padding, with from four to no predictions."""
    rng = np.random.default_rng(seed)
    sizes = np.array([16, 16, 12, 10, 9, 7, 5, 0])
    real = np.arange(LENGTH) < sizes[:, None]
    predictions = np.array([4, 1, 4, 3, 2, 1, 1, 0])
    counted = np.arange(PREDICTIONS) < predictions[:, None]
    positions = np.zeros((ROWS, PREDICTIONS), np.int32)
    for row, (size, count) in enumerate(zip(sizes, predictions, strict=True)):
        positions[row, :count] = np.sort(rng.choice(np.arange(1, max(size, 2)), count, replace=False))
    return {
        "tokens": np.where(real, rng.integers(1, 64, real.shape), 0).astype(np.int32),
        "segment_ids": real.astype(np.int32),
        "token_types": (real & (np.arange(LENGTH) >= 4)).astype(np.int32),
        "masked_positions": positions,
        "targets": np.where(counted, rng.integers(1, 64, counted.shape), 0).astype(np.int32),
        "loss_mask": counted.astype(np.float32),
        "next_sentence": rng.integers(0, 2, (ROWS, 1)).astype(np.int32),
        "row_mask": (sizes[:, None] > 0).astype(np.float32),
    }


def step_and_state(rules=None, optimizer=GRADIENT, **settings):
    config = TrainConfig(steps=10, batch_size=ROWS, attention="xla", **settings)
    model = module_of(MODEL) if rules is None else module_of(MODEL, place=rules.spec)
    tx, rate = make_optimizer(optimizer, ScheduleConfig(), total_steps=10, batch_size=ROWS, axes=logical_axes(MODEL))
    params = jax.tree.map(jnp.asarray, initial_params(MODEL))
    if rules is not None:
        params = jax.device_put(params, rules.shardings(logical_axes(MODEL), params))
    zero = jnp.zeros((), jnp.int32)
    return jax.jit(make_train_step(model, tx, rate, config, rules)), TrainState(
        zero, params, tx.init(params), None, zero
    )


def cut(batch, microbatches):
    return {name: jnp.asarray(x.reshape(microbatches, -1, x.shape[-1])) for name, x in batch.items()}


def textbook(params, batch):
    """The objective as the paper has it: means over predictions and over rows, logits of all positions gathered."""
    model = module_of(MODEL)
    strategy = SelfAttention(batch["segment_ids"], "reference", causal=False)
    hidden, _ = model.apply({"params": params}, batch["tokens"], strategy, batch["token_types"])
    log_p = jax.nn.log_softmax(model.apply({"params": params}, hidden, method="logits"))
    rows = jnp.arange(ROWS)[:, None]
    at = log_p[rows, batch["masked_positions"]]
    masked = (
        jnp.sum(-at[rows, jnp.arange(PREDICTIONS), batch["targets"]] * batch["loss_mask"]) / batch["loss_mask"].sum()
    )
    sentences = jax.nn.log_softmax(model.apply({"params": params}, hidden, method="next_sentence_logits"))
    chosen = sentences[jnp.arange(ROWS), batch["next_sentence"][:, 0]]
    following = jnp.sum(-chosen * batch["row_mask"][:, 0]) / batch["row_mask"].sum()
    right = (at.argmax(-1) == batch["targets"]) * batch["loss_mask"]
    right_rows = (sentences.argmax(-1) == batch["next_sentence"][:, 0]) * batch["row_mask"][:, 0]
    scalars = {"loss": masked, "accuracy": right.sum() / batch["loss_mask"].sum()}
    scalars |= {"next_sentence_loss": following, "next_sentence_accuracy": right_rows.sum() / batch["row_mask"].sum()}
    return masked + following, scalars


def change(before, after):
    return jax.tree.map(lambda a, b: np.asarray(a, np.float64) - np.asarray(b, np.float64), before, after)


def distance(got, expected):
    largest = max(np.abs(np.asarray(x)).max() for x in jax.tree.leaves(expected))

    def of(a, b):
        return np.abs(a - np.asarray(b)).max() / max(np.abs(b).max(), 1e-3 * largest)

    return max(jax.tree.leaves(jax.tree.map(of, got, expected)))


@pytest.fixture(scope="module")
def expected():
    params = jax.tree.map(jnp.asarray, initial_params(MODEL))
    (objective, scalars), gradient = jax.jit(jax.value_and_grad(textbook, has_aux=True))(params, make_batch())
    return scalars | {"objective": objective}, gradient


@pytest.mark.parametrize("microbatches", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_the_update_is_the_gradient_of_the_textbook_loss_however_the_batch_is_cut(microbatches, expected):
    step, state = step_and_state(microbatches=microbatches)
    after, metrics = step(state, cut(make_batch(), microbatches))
    scalars, gradient = expected
    assert distance(change(state.params, after.params), gradient) < 1e-3
    for name, value in scalars.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    assert metrics["tokens"] == make_batch()["segment_ids"].sum()


CLASSES = DataConfig(sequence_length=LENGTH, labelled=LabelledConfig(("a", "b", "c")))
OF_MEANS = dataclasses.replace(MODEL, encoder=EncoderConfig(num_classes=3, pooling="mean"))


@pytest.mark.parametrize(("model", "data"), [(MODEL, PAIRS), (OF_MEANS, CLASSES)], ids=["pretraining", "classifier"])
def test_the_step_can_be_cut_over_a_mesh(model, data):
    """Traced, not compiled: what cannot be sharded fails here. That the numbers are the same costs more time."""
    config = build(ExperimentConfig, base(model, data).to_dict())
    train = dataclasses.replace(config.train, batch_size=ROWS, microbatches=2, dropout=0.1, remat="full", loss_chunk=2)
    for mesh in (MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=4, tensor=2, layout="zero2")):
        assert assemble(dataclasses.replace(config, mesh=mesh, train=train)).traced


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=4, tensor=2, layout="zero2")])
def test_a_mesh_changes_nothing(mesh, expected):
    rules = Rules.make(mesh)
    with jax.set_mesh(rules.mesh):
        step, state = step_and_state(rules, microbatches=2)
        # Of each microbatch every device has a row.
        order = np.arange(ROWS).reshape(2, -1).ravel()
        after, metrics = step(state, place_batch({k: v[order] for k, v in make_batch().items()}, rules, 2))
        moved = change(state.params, after.params)
        evaluated = make_evaluate(module_of(MODEL, place=rules.spec), TrainConfig(), rules)(
            state.params, [make_batch()]
        )
    scalars, gradient = expected
    assert distance(moved, gradient) < 1e-3
    np.testing.assert_allclose(metrics["objective"], scalars["objective"], rtol=1e-5)
    for name, value in evaluated.scalars.items():
        np.testing.assert_allclose(value, scalars[name], rtol=1e-5, err_msg=name)
    assert evaluated.tokens == make_batch()["loss_mask"].sum()


@pytest.mark.slow
def test_biases_and_norm_scales_neither_decay_nor_adapt():
    step, state = step_and_state(optimizer=OptimizerConfig("lamb", 0.1, weight_decay=0.5))
    after, _ = step(state, cut(make_batch(), 1))
    for (path, moved), before in zip(
        jax.tree.leaves_with_path(change(state.params, after.params)), jax.tree.leaves(state.params), strict=True
    ):
        if path[-1].key in ("bias", "scale"):  # a plain step of Adam: the first is as large as the rate, or nothing
            assert np.abs(moved).max() < 0.101
            # No softmax feels the bias of its keys, which has no gradient but for rounding.
            assert np.isclose(np.abs(moved), 0.1, rtol=1e-2).mean() > 0.5 or path[-2].key == "key"
        else:  # each layer's tensor moves by a tenth of its norm
            axes = tuple(range(path[0].key == "layers", moved.ndim))
            ratio = np.sqrt(np.square(moved).sum(axes) / np.square(np.asarray(before, np.float64)).sum(axes))
            np.testing.assert_allclose(ratio, 0.1, rtol=1e-4, err_msg=str(path))


@pytest.mark.slow
def test_dropout_is_of_training_alone_and_the_same_when_a_step_is_done_again():
    model = module_of(MODEL, dropout=0.5)
    params, batch = jax.tree.map(jnp.asarray, initial_params(MODEL)), make_batch()
    loss = jax.jit(make_objective(model, TrainConfig(dropout=0.5)).loss)
    evaluated = loss(params, batch)[0]
    keys = [dropout_keys(jnp.int32(step), 2) for step in (3, 3, 4)]
    dropped = [loss(params, batch | {"dropout_key": key})[0] for three in keys for key in three]
    assert dropped[:2] == dropped[2:4] and len({float(x) for x in (*dropped, evaluated)}) == 5
    np.testing.assert_allclose(evaluated, loss(params, batch)[0])
    values = Dropout(0.25).apply({}, jnp.ones((8, 100, 100)), rngs={"dropout": keys[0][0]})
    assert sorted(set(np.unique(values).round(5))) == [0.0, 1.33333] and values.mean() == pytest.approx(1, abs=0.01)


def experiment(folder, **changes):
    corpus = folder / "corpus.jsonl"
    data = DataConfig(
        sources=(SourceConfig(kind="jsonl", path=str(corpus if corpus.exists() else write_corpus(corpus))),),
        tokenizer=TokenizerConfig(vocab_size=300),
        sequence_length=32,
        heldout_fraction=0.1,
        masked=MaskedConfig(max_predictions=6),
    )
    model = bert_config(vocab_size=320, num_layers=1, embed_dim=16, num_heads=2, mlp_dim=16, max_length=32)
    config = base(model, data)
    config.train.steps, config.train.batch_size, config.train.microbatches = 4, 16, 2
    config.train.remat, config.train.dropout = "none", 0.1
    config.schedule.kind = "constant"
    config.eval.every = config.checkpoint.every = 2
    config.eval.batches = 2
    config.update(changes)
    return build(ExperimentConfig, config.to_dict())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run without a break, and its folder."""
    folder = tmp_path_factory.mktemp("runs")
    return train(experiment(folder), folder / "whole"), folder


def test_a_run_evaluates_and_goes_on_where_it_stopped(whole):
    result, folder = whole
    assert set(result.heldout.scalars) == {"loss", "accuracy", "next_sentence_loss", "next_sentence_accuracy"}
    config = experiment(folder)
    train(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2)), folder / "broken")
    resumed = train(config, folder / "broken")
    rows = read_metrics(result.workdir.metrics)
    assert rows[-1]["tokens_seen"] == result.tokens > 4 * 16 * 6, "tokens are those of the text, not the predictions"
    assert resumed.step == 4 and resumed.tokens == result.tokens
    again = read_metrics(resumed.workdir.metrics)
    for name in ("loss", "accuracy", "next_sentence_loss", "gradient_norm", "eval_accuracy"):
        assert again[-1][name] == rows[-1][name], name
    assert resumed.heldout == result.heldout
    text = io.StringIO()
    print_report(summarize(result), Console(file=text, width=200))
    assert "held-out" in text.getvalue() and "bits per byte" not in text.getvalue()


@pytest.mark.slow
def test_a_classifier_starts_from_the_pretrained_encoder(whole):
    result, folder = whole
    (folder / "labelled.jsonl").write_text(
        "".join(json.dumps({"text": f"alpha beta {i}", "label": "ab"[i % 2]}) + "\n" for i in range(40))
    )
    source = SourceConfig(kind="jsonl", path=str(folder / "labelled.jsonl"))
    config = experiment(folder)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, encoder=EncoderConfig(num_classes=2)),
        data=dataclasses.replace(
            config.data,
            sources=(source,),
            masked=None,
            labelled=LabelledConfig(("a", "b")),
            heldout_fraction=0.3,
            tokenizer=TokenizerConfig(path=str(result.workdir.path)),
        ),
        train=dataclasses.replace(config.train, init_from=str(result.workdir.path), steps=1),
    )
    parts = make_parts(config, Workdir(folder / "classifier"))
    with jax.set_mesh(parts.rules.mesh), Checkpointer(folder / "classifier") as checkpointer:
        state, _ = make_state(parts, checkpointer)
    _, donor = restore_params(result.workdir.path)
    assert set(state.params) - set(donor) == {"classifier"} and state.params["classifier"]["kernel"].shape == (16, 2)
    for name in set(state.params) - {"classifier"}:
        jax.tree.map(np.testing.assert_array_equal, state.params[name], donor[name])
    tuned = train(config, folder / "classifier")
    assert tuned.heldout.tokens == parts.prepared.heldout_rows and set(tuned.heldout.scalars) == {"loss", "accuracy"}


def test_what_does_not_fit_an_encoder_is_refused(tmp_path):
    config = experiment(tmp_path)
    with pytest.raises(UserError, match=r"is an encoder: set one of config\.data\.masked"):
        values = to_dict(config)
        values["data"]["masked"] = None
        build(ExperimentConfig, values)
    for axis in ("sequence", "stage"):
        mesh = MeshConfig(**{"data": 4, axis: 2})
        with pytest.raises(UserError, match=f"config.mesh.{axis}=2 cuts no encoder"):
            check_fit(dataclasses.replace(config, mesh=mesh), Rules.make(mesh))
