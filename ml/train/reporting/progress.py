"""What a run shows while it runs: a bar on a terminal, a line every few seconds in a log."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

# A bar drawn more often than this costs time that the step could use; the eye gains nothing.
_DRAWS_PER_SECOND = 4.0
# Speed is averaged over about this long, so that it neither jumps nor lags.
_SPEED_WINDOW_SECONDS = 10.0


class ProgressDisplay:
    """Shows step, loss, speed and time left on stderr.

    A context manager. On a terminal one bar is redrawn in place; elsewhere a plain line is written at the first step,
    then every ``line_seconds``, and at the end.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        first_step: int = 0,
        peak_flops: float | None = None,
        flops_per_token: float | None = None,
        unit: str = "tokens",
        line_seconds: float = 5.0,
        stream: TextIO | None = None,
        terminal: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Sets up; nothing is shown before the context is entered.

        Args:
          total_steps: last step of the run.
          first_step: steps done before (on resume).
          peak_flops: FLOP/s of all devices together; with ``flops_per_token``, model FLOPs utilization is shown.
          flops_per_token: of the model, forward and backward.
          unit: what is counted.
          line_seconds: time between lines where there is no terminal.
          stream: default stderr.
          terminal: whether to draw a bar; default: whether ``stream`` is a terminal.
          clock: returns seconds.
        """
        self._stream = sys.stderr if stream is None else stream
        console = Console(file=self._stream, force_terminal=terminal, highlight=False)
        self._terminal = console.is_terminal and not console.is_dumb_terminal
        self._console = console
        self._total, self._first, self._step = total_steps, first_step, first_step
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._unit = unit
        self._line_seconds, self._clock = line_seconds, clock
        self._loss: float | None = None
        self._noise_scale: float | None = None
        self._next_draw = 0.0
        self._shown_step: int | None = None
        # Points (time, step, tokens) at the two ends of the window over which speed is measured.
        self._tokens = 0
        self._mark: tuple[float, int, int] | None = None
        self._next_mark: tuple[float, int, int] | None = None
        self._speed: tuple[float, float] | None = None  # steps and tokens per second
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> "ProgressDisplay":
        if self._terminal:
            # auto_refresh would draw from a thread of its own, in the middle of the host's work.
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None, style="bright_black", complete_style="cyan", finished_style="green"),
                TextColumn("{task.fields[figures]}"),
                console=self._console,
                auto_refresh=False,
                redirect_stdout=False,  # stdout may be a file, and must stay one
                expand=True,
            )
            self._task = self._progress.add_task(
                self._steps(), total=self._total, completed=self._first, figures="starting"
            )
            self._progress.start()
            self._progress.refresh()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._shown_step != self._step:
            self._show()
        if self._progress is not None:
            self._progress.stop()

    def update(self, step: int, *, loss: float, tokens: int, noise_scale: float | None = None) -> None:
        """Reports a step that is done; cheap enough to call at every step.

        Args:
          step: its number, counted from 1.
          loss: its loss, in nats per token.
          tokens: counted tokens in its batch.
          noise_scale: of the gradient, in tokens, where it is measured.
        """
        now = self._clock()
        self._step, self._loss, self._noise_scale = step, loss, noise_scale
        if self._mark is None:  # the first step compiles: speed is measured from its end
            self._mark = self._next_mark = (now, step, 0)
        else:
            self._tokens += tokens
            elapsed = max(now - self._mark[0], 1e-9)
            self._speed = (step - self._mark[1]) / elapsed, (self._tokens - self._mark[2]) / elapsed
            assert self._next_mark is not None
            if now - self._next_mark[0] >= _SPEED_WINDOW_SECONDS:
                self._mark, self._next_mark = self._next_mark, (now, step, self._tokens)
        if now >= self._next_draw:
            self._show(now)

    def pause(self) -> None:
        """Leaves the time until the next step (evaluation, say) out of the speed."""
        self._mark = self._next_mark = None
        self._tokens = 0

    def log(self, text: str) -> None:
        """Prints a message above the bar, or as a line of its own."""
        if self._progress is not None:
            self._progress.console.print(Text(text))
        else:
            self._write(text)

    @property
    def tokens_per_second(self) -> float | None:
        """Speed over the last 10 to 20 seconds; ``None`` before the second step."""
        return self._speed and self._speed[1]

    def _show(self, now: float | None = None) -> None:
        now = self._clock() if now is None else now
        self._shown_step = self._step
        if self._progress is None:
            self._next_draw = now + self._line_seconds
            self._write(f"{self._steps()}  {self._figures()}")
            return
        self._next_draw = now + 1 / _DRAWS_PER_SECOND
        assert self._task is not None
        self._progress.update(
            self._task, completed=self._step, description=self._steps(), figures=self._figures(), refresh=True
        )

    def _write(self, line: str) -> None:
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except (OSError, ValueError):
            pass  # a closed pipe must not end the run

    def _steps(self) -> str:
        return f"step {self._step:,}/{self._total:,}"

    def _figures(self) -> str:
        figures = [] if self._loss is None else [f"loss {self._loss:.4f}"]
        if self._noise_scale is not None:
            figures.append(f"noise scale {short_number(self._noise_scale)} {self._unit}")
        if self._speed is not None:
            steps_per_second, tokens_per_second = self._speed
            figures.append(f"{short_number(tokens_per_second)} {self._unit}/s")
            if self._flops_per_token and self._peak_flops:
                figures.append(f"MFU {tokens_per_second * self._flops_per_token / self._peak_flops:.1%}")
            if self._step < self._total and steps_per_second > 0:
                figures.append(f"{duration((self._total - self._step) / steps_per_second)} left")
        return "  ".join(figures)


def short_number(value: float) -> str:
    """Three significant digits with a suffix: ``12.3k``, ``4.56M``."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * 0.9995:
            return f"{_three_digits(value / limit)}{suffix}"
    return _three_digits(value)


def duration(seconds: float) -> str:
    """``42 s``, ``3:07``, ``2:03:07`` or ``5 d 4 h``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _three_digits(value: float) -> str:
    text = f"{value:#.3g}"
    return (f"{value:.0f}" if "e" in text else text).rstrip(".")
