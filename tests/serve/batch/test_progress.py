"""What is shown of the engine's counts while a job runs."""

import io

import pytest
import rich.console

from ml.serve.batch.progress import Counts, Progress, guessed_share
from ml.serve.scheduling.statistics import Statistics


def shown(statistics: Statistics, monkeypatch) -> str:
    monkeypatch.setattr("ml.serve.batch.progress._LINE_SECONDS", -1.0)
    console = rich.console.Console(file=io.StringIO(), soft_wrap=True)
    with Progress(Counts(total=4, answered=1), statistics, console) as progress:
        progress.update()
    return console.file.getvalue()


def test_shares_of_what_was_cached_and_guessed(monkeypatch):
    counts = Statistics(prompt=200, cached=50, decoded=40, drafted=30, accepted=10)
    assert "25% of prompts cached, 25% of text guessed" in shown(counts, monkeypatch)
    assert guessed_share(counts) == pytest.approx(0.25)


def test_nothing_is_said_of_guesses_where_there_are_none(monkeypatch):
    assert "guessed" not in shown(Statistics(prompt=200, cached=50, decoded=40), monkeypatch)
    assert guessed_share(Statistics()) is None
