"""What of a finished step reaches the metrics file, and what a step that was not finite leads to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_cases import experiment, ragged_batch

from ml.errors import UserError
from ml.train.recorder import Pending, Recorder
from ml.train.reporting import read_metrics
from ml.train.workdir import Workdir


@pytest.fixture
def record(tmp_path):
    """Makes a recorder for ``tmp_path``; keys are the experiment's, ``__`` for the dot."""

    def make(first_step=0, tokens=0, skipped=0, state=None, **changes):
        config = experiment(tmp_path / "no.jsonl", **changes)
        known = {"flops_per_token": 10.0, "peak_flops": 1e6, "state": state or {"tokens": tokens}}
        return Recorder(config, Workdir(tmp_path), first_step=first_step, skipped=skipped, **known)

    return make


def pending(step, loss=2.0, skipped=0, tokens=100):
    names = ("balance", "objective", "learning_rate", "gradient_norm", "parameter_norm")
    scalars = dict.fromkeys(names, 1.0) | {"loss": loss, "tokens": float(tokens)}
    metrics = {name: jnp.float32(x) for name, x in scalars.items()} | {"skipped": jnp.int32(skipped)}
    return Pending(step, metrics, ragged_batch(2, seed=step))


def test_a_row_a_step(record, tmp_path):
    with record(tokens=1000) as recorder:
        recorder.finish(None)
        recorder.finish(pending(1, loss=3.5))
        recorder.finish(pending(2, tokens=50), {"eval_loss": 2.5})
        assert recorder.tokens == 1150
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert first == {
        "step": 1,
        "loss": 3.5,
        "tokens": 100,
        "tokens_seen": 1100,
        "skipped": 0,
        "learning_rate": 1.0,
        "gradient_norm": 1.0,
        "parameter_norm": 1.0,
    }
    assert second["tokens_seen"] == 1150 and second["eval_loss"] == 2.5
    assert second["mfu"] == pytest.approx(second["tokens_per_second"] * 10 / 1e6)


def test_each_layers_trust_ratio_is_in_the_row(record, tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr("ml.train.recorder.TensorBoardWriter.write", lambda _, step, scalars: events.append(scalars))
    one = pending(1)
    ratios = {"layers/mlp/kernel": jnp.array([0.123456, 3.0, jnp.nan]), "embed/embedding": jnp.float32(2.0)}
    with record() as recorder:
        more = {f"trust_ratio/{name}": ratio for name, ratio in ratios.items()}
        recorder.finish(Pending(1, one.metrics | more, one.batch))
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert row["trust_ratio/layers/mlp/kernel"][:2] == [0.1235, 3.0] and np.isnan(
        row["trust_ratio/layers/mlp/kernel"][2]
    )
    assert row["trust_ratio/embed/embedding"] == 2.0
    assert events[0]["trust_ratio/embed/embedding"] == 2.0, "TensorBoard has curves, not lists"
    assert "trust_ratio/layers/mlp/kernel" not in events[0], "the median of what holds a nan is none"


def with_noise(step, variance, signal):
    one = pending(step)
    return Pending(step, {**one.metrics, "noise_variance": variance, "noise_signal": signal}, one.batch)


def test_the_noise_scale_is_a_ratio_of_averages_that_a_restart_continues(record, tmp_path, capsys):
    steps = [(8.0, 2.0), (np.nan, np.nan), (4.0, -0.5), (4.0, 1.0)]
    steps = [tuple(map(jnp.float32, step)) for step in steps]
    with record() as recorder:
        for step, scalars in enumerate(steps[:3], 1):
            recorder.finish(with_noise(step, *scalars))
    with record(first_step=3, state=recorder.state) as recorder:
        recorder.finish(with_noise(4, *steps[3]))
        recorder.finish(pending(5))
    variance, signal = 0.95**2 * 8.0 + 0.95 * 4.0 + 4.0, 0.95**2 * 2.0 - 0.95 * 0.5 + 1.0
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[0]["noise_scale"] == pytest.approx(4.0) and rows[1]["noise_scale"] == pytest.approx(4.0)
    assert rows[3]["noise_scale"] == pytest.approx(variance / signal)
    assert rows[2]["noise_signal"] == -0.5, "each step's own numbers are there to be averaged otherwise"
    assert "noise_scale" not in rows[4]
    assert "noise scale 4.00 tokens" in capsys.readouterr().err


def test_rows_at_an_interval_and_always_where_the_run_stands(record, tmp_path):
    with record(train__log_every=3, train__steps=8) as recorder:
        for step in range(1, 9):
            recorder.finish(pending(step), {"eval_loss": 1.0} if step == 4 else None)
        assert recorder.tokens == 800
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [3, 4, 6, 8]


def test_a_resumed_run_drops_the_rows_that_it_writes_again(record, tmp_path):
    with record() as recorder:
        for step in (1, 2, 3):
            recorder.finish(pending(step))
    with record(first_step=2, tokens=200) as recorder:
        recorder.finish(pending(3, loss=9.0))
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"], row["tokens_seen"]) for row in rows] == [(1, 2, 100), (2, 2, 200), (3, 9, 300)]


def test_the_balancing_loss_is_shown_of_mixtures_only(record, tmp_path):
    with record(model__moe={"num_experts": 2, "top_k": 1, "mlp_dim": 8}) as recorder:
        recorder.finish(pending(1))
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["balance"] == 1.0


def test_stop_ends_the_run_and_keeps_the_batch(record, tmp_path):
    bad = pending(2, loss=np.nan, skipped=3)
    with record(skipped=2, train__nonfinite="stop") as recorder:
        recorder.finish(pending(1, skipped=2))  # steps that an earlier start skipped are no news
        with pytest.raises(UserError, match=r"^step 2: loss nan.*nonfinite_step_2.npz; go on with --config.train.non"):
            recorder.finish(bad)
    with np.load(tmp_path / "nonfinite_step_2.npz") as saved:
        assert saved.keys() == bad.batch.keys()
        for name, x in bad.batch.items():
            np.testing.assert_array_equal(saved[name], x)
    row = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert np.isnan(row["loss"]) and row["skipped"] == 3


def test_skip_says_so_and_goes_on(record, tmp_path, capsys):
    with record(train__nonfinite="skip") as recorder:
        recorder.finish(pending(1, loss=np.inf, skipped=1))
        recorder.finish(pending(2, skipped=1))
        recorder.finish(pending(3, skipped=2))
    told = [line for line in capsys.readouterr().err.splitlines() if "not finite, step skipped" in line]
    assert [line.split(":")[0] for line in told] == ["step 1", "step 3"] and told[1].endswith("(2 so far)")
    assert [row["skipped"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 1, 2]
    assert not list(tmp_path.glob("*.npz"))


def test_only_the_first_process_writes(record, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with record() as recorder:
        recorder.finish(pending(1))
        recorder.plot()
        assert recorder.tokens == 100
    assert not list(tmp_path.iterdir())


def test_the_curve_is_drawn_from_the_rows(record, tmp_path):
    with record() as recorder:
        recorder.finish(pending(1))
        recorder.plot()
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_curve_that_cannot_be_written_is_named(record, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")  # as a write to an open file fails: without the file's name

    monkeypatch.setattr("ml.train.recorder.plot_loss", full)
    with record() as recorder:
        recorder.finish(pending(1))
        with pytest.raises(UserError, match=r"loss.png: cannot be written: No space left on device; .*free some space"):
            recorder.plot()
