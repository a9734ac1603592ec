"""The loop as a whole: same seed same run, rows and evaluations where they belong, and the host a step ahead."""

import inspect
import json
import types

import numpy as np
import pytest
from training_cases import experiment, write_corpus

import ml.train.loop as loop
from ml.errors import UserError
from ml.train.reporting import read_metrics

pytestmark = pytest.mark.usefixtures("quick_compilation")
CLOCK = ("tokens_per_second", "mfu")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus.jsonl")


@pytest.fixture
def train(corpus, tmp_path):
    def run(name="run", **changes):
        common = {"data__cache_dir": str(corpus.parent / "cache"), "train__microbatches": 1, "checkpoint__every": 100}
        return loop.train(experiment(corpus, **common | changes), tmp_path / name)

    return run


def rows(result):
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in read_metrics(result.workdir.metrics)]


def test_a_seed_decides_everything(train):
    first, second, other = train("a"), train("b"), train("c", seed=1)
    assert rows(first) == rows(second)
    assert first.heldout == second.heldout
    for key in ("loss", "tokens"):
        assert [row[key] for row in rows(first)] != [row[key] for row in rows(other)], key


@pytest.mark.usefixtures("drawn_reports")
def test_what_a_run_returns_and_leaves(train):
    result = train(train__steps=7, eval__every=3, train__log_every=2, optimizer__learning_rate=0.1)
    metrics = rows(result)
    assert [row["step"] for row in metrics] == [2, 3, 4, 6, 7]
    assert [row["step"] for row in metrics if "eval_loss" in row] == [3, 6]
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert result.step == 7 and result.interrupted is None
    assert result.tokens == metrics[-1]["tokens_seen"] > result.session_tokens > 0
    assert result.heldout.tokens == sum(batch["loss_mask"].sum() for batch in loop_heldout(result))
    assert 0 < result.heldout.per_token < metrics[0]["loss"]
    assert result.seconds > 0 and result.memory.params > 0
    names = {path.name for path in result.workdir.path.iterdir()}
    assert names == {
        "checkpoints",
        "experiment.json",
        "loss.png",
        "metrics.jsonl",
        "report.html",
        "summary.json",
        "tensorboard",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert json.loads(result.workdir.experiment.read_text())["train"]["steps"] == 7
    summary = json.loads(result.workdir.summary.read_text())
    assert (summary["ended"], summary["parameters"]) == ("finished", result.parameters)
    assert summary["heldout"]["loss"] == result.heldout.per_token and summary["heldout"]["bits_per_byte"] > 0
    assert summary["memory"]["predicted"] == result.memory.predicted
    ratios = [name for name in metrics[0] if name.startswith("trust_ratio/")]
    assert ratios and all(name in result.workdir.metrics.read_text() for name in ratios)
    assert "Trust ratios by layer" in result.workdir.report.read_text()

    again = train(train__steps=7, eval__every=3, train__log_every=2, optimizer__learning_rate=0.1)
    assert (again.step, again.tokens, again.session_tokens, again.memory) == (7, result.tokens, 0, None)
    assert again.heldout == result.heldout
    assert rows(again) == metrics
    known = json.loads(result.workdir.summary.read_text())
    assert known["memory"] == summary["memory"], "a start with nothing left to do forgets nothing"


def loop_heldout(result):
    from ml.data import heldout_batches

    return heldout_batches(result.prepared, global_batch_size=8)


def test_a_step_is_read_only_after_the_next_one_was_sent(train, monkeypatch):
    events = []
    place, finish = loop.place_batch, loop.Recorder.finish

    def noting_place(*arguments):
        events.append("next")
        return place(*arguments)

    def noting_finish(self, pending, more=None):
        if pending is not None:
            events.append(pending.step)
        finish(self, pending, more)

    monkeypatch.setattr(loop, "place_batch", noting_place)
    monkeypatch.setattr(loop.Recorder, "finish", noting_finish)
    train(train__steps=4)
    assert events == ["next", "next", 1, "next", 2, "next", 3, 4]


@pytest.mark.usefixtures("drawn_reports")
def test_a_loss_that_explodes(train, tmp_path):
    explosive = {"optimizer__name": "sgd", "optimizer__learning_rate": 1e37, "schedule__kind": "constant"}
    with pytest.raises(UserError, match=r"^step 2: .*gradient norm nan.*nonfinite_step_2.npz"):
        train("stop", **explosive)
    with np.load(tmp_path / "stop" / "nonfinite_step_2.npz") as batch:
        assert batch["tokens"].shape == (8, 32) and batch["loss_mask"].any()
    assert [row["skipped"] for row in read_metrics(tmp_path / "stop" / "metrics.jsonl")] == [0, 1]
    summary = json.loads((tmp_path / "stop" / "summary.json").read_text())
    assert summary["ended"] == "failed" and summary["reason"].startswith("step 2: ")
    assert "failed: step 2: " in (tmp_path / "stop" / "report.html").read_text()
    result = train("skip", train__nonfinite="skip", **explosive)
    assert [row["skipped"] for row in read_metrics(result.workdir.metrics)] == [0, 1, 2, 3]
    assert result.step == 4


@pytest.mark.slow
def test_evaluation_and_saving_are_left_out_of_the_time(train, monkeypatch):
    train(train__steps=1)
    clock, place, save = [0.0], loop.place_batch, loop.Checkpointer.save

    def second_a_step(*arguments):
        clock[0] += 1
        return place(*arguments)

    def slow_save(*arguments, **options):
        clock[0] += 1000
        return save(*arguments, **options)

    monkeypatch.setattr(loop, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(loop, "place_batch", second_a_step)
    monkeypatch.setattr(loop.Checkpointer, "save", slow_save)
    # Steps 2 to 7. Time counts from when step 3 is done and step 4 is under way; one pause comes before, three after.
    result = train(train__steps=7, checkpoint__every=2)
    assert result.seconds == 3.0
    assert result.session_tokens == sum(row["tokens"] for row in rows(result)[3:])


@pytest.mark.slow
def test_without_held_out_text_there_is_no_evaluation(train):
    result = train(data__heldout_fraction=0.0, eval__every=2)
    assert result.heldout is None
    assert not any("eval_loss" in row for row in rows(result))


def test_the_moving_average_is_what_is_evaluated(train):
    plain, averaged = train("a"), train("b", train__ema=0.99)
    assert [row["loss"] for row in rows(plain)] == [row["loss"] for row in rows(averaged)]
    assert plain.heldout.nats != averaged.heldout.nats


def test_the_loop_stays_readable():
    assert len(inspect.getsource(loop.train).splitlines()) <= 150
