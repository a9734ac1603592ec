"""How far a job has come, for people: a bar on a terminal, a line now and then elsewhere."""

import dataclasses
import time
from typing import Any

import rich.console
import rich.progress

from ml.serve.scheduling.statistics import Statistics

_LINE_SECONDS = 30.0
_MOST_ERRORS = 5


@dataclasses.dataclass
class Counts:
    """Of a job, in requests where nothing else is said.

    Attributes:
      total: in the input.
      before: done when the job was started.
      answered, failed: since then.
      written: tokens of answers.
    """

    total: int
    before: int = 0
    answered: int = 0
    failed: int = 0
    written: int = 0

    @property
    def done(self) -> int:
        """All that are, whenever."""
        return self.before + self.answered + self.failed


class Progress:
    """Shows counts on standard error while a job runs."""

    def __init__(self, counts: Counts, statistics: Statistics, console: rich.console.Console | None = None):
        """Shows nothing yet; ``counts`` and ``statistics`` are looked at whenever `update` is called."""
        self._counts, self._statistics = counts, statistics
        self._console = console or rich.console.Console(stderr=True, highlight=False, soft_wrap=True)
        self._begin = self._last = time.monotonic()
        self._errors = 0
        self._bar: rich.progress.Progress | None = None
        self._task: Any = None

    def __enter__(self) -> "Progress":
        if self._console.is_terminal:
            self._bar = rich.progress.Progress(
                rich.progress.BarColumn(),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TextColumn("{task.description}"),
                rich.progress.TimeRemainingColumn(),
                rich.progress.TextColumn("left"),
                console=self._console,
                speed_estimate_period=120,
            )
            self._task = self._bar.add_task("", total=self._counts.total, completed=self._counts.before)
            self._bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            self.update()
            self._bar.stop()

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._begin

    def update(self) -> None:
        """Shows how it stands now."""
        if self._bar is not None:
            self._bar.update(self._task, completed=self._counts.done, description=self._rates())
        elif time.monotonic() - self._last > _LINE_SECONDS:
            self._last = time.monotonic()
            counts = self._counts
            here = counts.answered + counts.failed
            left = f", {_clock(self.seconds * (counts.total - counts.done) / here)} left" if here else ""
            self.note(f"{counts.done:,} of {counts.total:,} requests, {self._rates()}{left}")

    def error(self, message: str) -> None:
        """Shows one of the first errors; the others are in the file alone."""
        self._errors += 1
        if self._errors <= _MOST_ERRORS:
            self.note(f"error: {message}")
        elif self._errors == _MOST_ERRORS + 1:
            self.note("further errors: see the output")

    def note(self, message: str) -> None:
        """Shows a line."""
        self._console.print(" ".join(message.split()), markup=False)

    def _rates(self) -> str:
        speed = self._counts.written / max(self.seconds, 1e-9)
        rates = f"{speed:,.0f} tokens/s, {hit_share(self._statistics):.0%} of prompts cached"
        guessed = guessed_share(self._statistics)
        return rates if guessed is None else f"{rates}, {guessed:.0%} of text guessed"


def hit_share(statistics: Statistics) -> float:
    """Which part of the prompts' tokens was found in the cache."""
    return statistics.cached / max(statistics.prompt, 1)


def guessed_share(statistics: Statistics) -> float | None:
    """Which part of the text came from right guesses; ``None``: none was guessed."""
    return statistics.accepted / max(statistics.decoded, 1) if statistics.drafted else None


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
