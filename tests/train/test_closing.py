"""`ml/train/closing.py`: what is left when a run ends; that a report which fails costs nothing but a line."""

import json
import signal
from types import SimpleNamespace

import jax
import pytest

import ml.train.closing as closing
from ml.train.closing import Closing
from ml.train.reporting import MetricsFile
from ml.train.workdir import Workdir

pytestmark = pytest.mark.usefixtures("drawn_reports")


@pytest.fixture
def workdir(tmp_path):
    with MetricsFile(tmp_path / "metrics.jsonl") as file:
        file.write(1, {"loss": 2.0, "tokens": 10, "tokens_seen": 10})
    return Workdir(tmp_path)


def began(workdir):
    one = Closing(workdir)
    prepared = SimpleNamespace(codes_text=True, heldout_bytes=100)
    one.begin(SimpleNamespace(prepared=prepared), 1234)
    return one


def test_an_interrupted_run_says_so(workdir):
    with began(workdir) as one:
        one.interrupted = signal.SIGTERM
    summary = json.loads(workdir.summary.read_text())
    assert (summary["ended"], summary["reason"], summary["parameters"]) == ("interrupted", "SIGTERM", 1234)
    assert summary["device"] and summary["versions"]["jax"] == jax.__version__
    assert "interrupted: SIGTERM" in workdir.report.read_text()


def test_before_the_folder_is_the_runs_own_nothing_is_written(workdir):
    with Closing(workdir):
        pass
    assert not workdir.summary.exists() and not workdir.report.exists()


def test_only_the_first_process_writes(workdir, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with began(workdir):
        pass
    assert not workdir.summary.exists()


@pytest.mark.parametrize("broken", ["write_report", "write_whole", "read_run"])
def test_a_report_that_fails_costs_a_line(workdir, monkeypatch, capsys, broken):
    def fails(*_):
        raise RuntimeError("no\nfonts")

    monkeypatch.setattr(closing, broken, fails)
    with began(workdir):
        pass
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ") and "RuntimeError: no fonts" in line and "the run itself is whole" in line
    with pytest.raises(ValueError, match="the run's own"), began(workdir):  # it does not hide what ended the run
        raise ValueError("the run's own")
