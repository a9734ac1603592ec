"""The pictures of a run's report, each a function that draws on axes; which ones there are depends on the run."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ml.train.reporting.figure import BLUE, GREEN, GREY, INK, ORANGE, PALETTE, RED, new_figure, style
from ml.train.reporting.plots import draw_loss, round_number, smooth, step_style, tokens_on_top
from ml.train.reporting.run import TRUST_RATIO, Run

# More points than a picture has pixels make the file heavy and nothing clearer.
_POINTS = 1500
# Columns that have a panel of their own, or are no curves.
_SHOWN = {
    *("step", "loss", "tokens", "tokens_seen", "tokens_per_second", "mfu", "learning_rate", "gradient_norm"),
    *("parameter_norm", "noise_variance", "noise_signal", "noise_scale", "skipped"),
}
_FEW_CELLS = 60


@dataclasses.dataclass(frozen=True)
class Panel:
    """A picture of a report.

    Attributes:
      title: above it.
      draw: draws on the axes that it is given.
      note: what is to be known to read it.
      wide: whether it takes a whole row of the page.
      room: inches left for what stands around the axes: left, right, top, bottom.
    """

    title: str
    draw: Callable[[Any], None]
    note: str = ""
    wide: bool = False
    room: tuple[float, float, float, float] = (0.65, 0.15, 0.12, 0.5)

    def figure(self) -> Any:
        """The picture, transparent."""
        figure = new_figure(10.8 if self.wide else 5.2, 4.0 if self.wide else 2.9, room=self.room)
        self.draw(figure.subplots())
        for axes in figure.axes:
            axes.set_facecolor("none")
            axes.tick_params(labelsize=9)
        return figure


def panels_of(run: Run) -> Iterator[Panel]:
    """The pictures of ``run``, in the order of the page."""
    held_out = "of training and on held-out data"
    yield Panel("Loss", lambda axes: _draw_loss(axes, run), held_out, wide=True, room=(0.75, 0.2, 0.65, 0.55))
    if run.column("tokens_per_second")[0].size:
        yield Panel("Throughput", lambda axes: _draw_speed(axes, run), f"{run.unit} per second, all devices together")
    if run.column("gradient_norm")[0].size:
        yield Panel("Gradient norm", lambda axes: _draw_norm(axes, run), "L2, of all parameters, before clipping")
    if run.column("learning_rate")[0].size:
        yield Panel("Learning rate", lambda axes: _draw_line(axes, run, "learning_rate", GREEN), "the schedule's")
    if run.column("parameter_norm")[0].size:
        yield Panel("Parameter norm", lambda axes: _draw_line(axes, run, "parameter_norm", BLUE), "L2, all parameters")
    if run.trust_ratios():
        yield Panel(
            "Trust ratios",
            lambda axes: _draw_ratios(axes, run),
            "how far a tensor's update is stretched to the tensor's own length; the median over layers",
        )
        yield Panel(
            "Trust ratios by layer",
            lambda axes: _draw_ratio_map(axes, run),
            "geometric mean over the last tenth of the steps",
            room=(1.4, 0.15, 0.12, 0.5),
        )
    if run.column("noise_scale")[0].size:
        note = "tr(Σ) / |G|², in tokens: batches far beyond it gain little more"
        yield Panel("Gradient noise scale", lambda axes: _draw_noise(axes, run), note)
    for name in _others(run):
        drawn = functools.partial(_draw_line, run=run, name=name, colour=BLUE)
        yield Panel(name.replace("_", " ").capitalize(), drawn)
    if run.summary.get("memory"):
        yield Panel(
            "Memory of a device",
            lambda axes: _draw_memory(axes, run.summary["memory"]),
            "as the compiler planned it, on the fullest device",
            room=(0.15, 0.15, 0.12, 0.5),
        )


def thinned(rows: Sequence[Mapping[str, Any]], points: int = _POINTS) -> list[Mapping[str, Any]]:
    """About ``points`` rows, evenly spread, with all that hold an evaluation, and the last."""
    if len(rows) <= points:
        return list(rows)
    stride = len(rows) / points
    kept = {int(index * stride) for index in range(points)} | {len(rows) - 1}
    kept |= {index for index, row in enumerate(rows) if any(name.startswith("eval_") for name in row)}
    return [rows[index] for index in sorted(kept)]


def _others(run: Run) -> list[str]:
    """Further columns of numbers: a mixture's balance, an encoder's accuracy, whatever an objective reports."""
    names = dict.fromkeys(name for row in thinned(run.rows, 50) for name in row)
    own = [name for name in names if name not in _SHOWN and not name.startswith((TRUST_RATIO, "eval_"))]
    return [name for name in own if isinstance(next(r[name] for r in run.rows if name in r), int | float)]


def _draw_loss(axes: Any, run: Run) -> None:
    rows = thinned(run.rows)
    draw_loss(axes, rows, run.unit)
    tokens_on_top(axes, rows, run.unit)
    axes.set_xlabel("step", color=INK)


def _plain_column(run: Run, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A column of numbers, thinned, with only what is finite."""
    rows = thinned([row for row in run.rows if row.get(name) is not None])
    steps, values = np.array([row["step"] for row in rows], float), np.array([row[name] for row in rows], float)
    usable = np.isfinite(values)
    return steps[usable], values[usable]


def _draw_line(axes: Any, run: Run, name: str, colour: str) -> None:
    step_style(axes)
    axes.plot(*_plain_column(run, name), color=colour, linewidth=1.6)
    steps, heldout = _plain_column(run, f"eval_{name}")
    if steps.size:
        axes.plot(steps, heldout, color=ORANGE, marker="o", markersize=4, linewidth=1.2, label="held-out")
        axes.legend(fontsize=9, frameon=False)
    if name == "learning_rate":
        axes.set_ylim(bottom=0)
    axes.set_xlabel("step", color=INK)


def _draw_speed(axes: Any, run: Run) -> None:
    from matplotlib.ticker import FuncFormatter

    step_style(axes)
    steps, speed = _plain_column(run, "tokens_per_second")
    axes.plot(steps, speed, color=BLUE, linewidth=1.6)
    if speed.size:
        axes.set_ylim(0, max(np.percentile(speed, 99.5) * 1.2, 1e-9))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: round_number(value)))
    axes.set_xlabel("step", color=INK)
    mfu = _plain_column(run, "mfu")[1]
    if mfu.size:
        axes.text(0.98, 0.06, f"MFU {np.median(mfu):.1%}", transform=axes.transAxes, ha="right", color=GREY)


def _draw_norm(axes: Any, run: Run) -> None:
    step_style(axes)
    steps, norm = _plain_column(run, "gradient_norm")
    axes.plot(steps, norm, color=RED, alpha=0.4, linewidth=0.9)
    axes.plot(steps, smooth(norm, 2 * (norm.size // 40) + 1), color=RED, linewidth=1.8)
    if norm.size and norm.min() > 0 and norm.max() > 20 * np.median(norm):
        axes.set_yscale("log")
    elif norm.size:
        axes.set_ylim(0, np.percentile(norm, 99.5) * 1.15 or 1)
    axes.set_xlabel("step", color=INK)


def _draw_ratios(axes: Any, run: Run) -> None:
    step_style(axes)
    ratios = run.trust_ratios()
    for index, (name, (steps, values)) in enumerate(ratios.items()):
        kept = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), 400)).astype(int))
        usable = np.isfinite(values[kept]).any(1)
        middle = np.full(len(kept), np.nan)
        middle[usable] = np.nanmedian(values[kept][usable], axis=1)
        colour, dash = PALETTE[index % len(PALETTE)], "--" if index >= len(PALETTE) else "-"
        axes.plot(steps[kept], np.where(middle > 0, middle, np.nan), color=colour, linestyle=dash, label=name)
    _log_scale(axes, "{:g}".format)
    axes.set_xlabel("step", color=INK)
    axes.legend(fontsize=8, frameon=False, ncols=2 if len(ratios) > 4 else 1)


def _draw_ratio_map(axes: Any, run: Run) -> None:
    from matplotlib.colors import LogNorm

    ratios = run.trust_ratios()
    last = {name: _last_tenth(values) for name, (_, values) in ratios.items()}
    width = max(map(len, last.values()))
    table = np.full((len(last), width), np.nan)
    for row, values in enumerate(last.values()):
        table[row, : len(values)] = values
    known = table[np.isfinite(table)]
    low, high = (known.min(), known.max()) if known.size else (0.1, 1.0)
    axes.imshow(table, aspect="auto", cmap="viridis", norm=LogNorm(low, max(high, low * 1.01)), interpolation="nearest")
    axes.set_yticks(range(len(last)), list(last))
    axes.set_xticks(sorted({round(x) for x in np.linspace(0, width - 1, min(width, 9))}))
    axes.set_xlabel("layer", color=INK)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if known.size <= _FEW_CELLS:
        middle = math.sqrt(low * high)
        for (row, column), value in np.ndenumerate(table):
            if np.isfinite(value):
                colour = "#f8f8f8" if value < middle else "#111111"
                axes.text(column, row, f"{value:.2g}", ha="center", va="center", fontsize=9, color=colour)


def _last_tenth(values: np.ndarray) -> np.ndarray:
    """Geometric means ``[tensors]`` over the last rows of ``values [rows, tensors]``."""
    last = values[-max(1, len(values) // 10) :]
    usable = np.where(np.isfinite(last) & (last > 0), last, np.nan)
    with np.errstate(invalid="ignore"):
        counts = np.isfinite(usable).sum(0)
        return np.where(counts, np.exp(np.nansum(np.log(usable), axis=0) / np.maximum(counts, 1)), np.nan)


def _draw_noise(axes: Any, run: Run) -> None:
    step_style(axes)
    steps, scale = _plain_column(run, "noise_scale")
    positive = scale > 0
    axes.plot(steps[positive], scale[positive], color=BLUE, linewidth=1.6, label="noise scale")
    batch_steps, batch = _plain_column(run, "tokens")
    axes.plot(batch_steps, batch, color=ORANGE, linewidth=1.2, linestyle="--", label="this run's batch")
    _log_scale(axes, round_number)
    axes.set_xlabel("step", color=INK)
    axes.legend(fontsize=9, frameon=False)


def _log_scale(axes: Any, written: Callable[[float], str]) -> None:
    """A logarithmic vertical axis with numbers in plain writing at 1, 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: written(value)))


def _draw_memory(axes: Any, memory: Mapping[str, int | None]) -> None:
    style(axes)
    names = {"params": "parameters", "opt_state": "optimizer state", "ema": "moving average", "temporary": "temporary"}
    left = 0.0
    for colour, (key, name) in zip((BLUE, ORANGE, GREEN, GREY), names.items(), strict=True):
        size = (memory.get(key) or 0) / 2**20
        if size:
            axes.barh([0], [size], left=left, color=colour, height=0.5, label=f"{name} {_three_digits(size)} MiB")
            left += size
    peak = memory.get("measured_peak")
    if peak:
        axes.axvline(peak / 2**20, color=RED, linewidth=2, label=f"measured peak {_three_digits(peak / 2**20)} MiB")
    axes.set_ylim(-0.5, 1.6)
    axes.set_yticks([])
    axes.set_xlabel("MiB", color=INK)
    axes.legend(fontsize=9, frameon=False, ncols=2, loc="upper left")


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
