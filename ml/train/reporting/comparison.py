"""Runs side by side: curves one over another, a table of where each stands, and in which settings they differ."""

import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ml.train.reporting.figure import GREY, INK, PALETTE, THEMED, new_figure, style, to_svg, write_png, write_whole
from ml.train.reporting.page import Page, Picture, Table, to_html
from ml.train.reporting.panels import Panel, thinned
from ml.train.reporting.plots import round_number, smooth, trend_of
from ml.train.reporting.progress import duration, short_number
from ml.train.reporting.run import Run
from ml.train.reporting.run_report import figures_of, shown

_AXES = {"tokens": "tokens", "step": "steps", "seconds": "time in steps"}
# What differs between any two runs and explains nothing.
_NOT_COMPARED = ("data.cache_dir",)
_ABSENT = "-"
# Seconds between two marks of an axis of time, at most six of them.
_TICKS = (1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 86_400, 7 * 86_400)
_COLUMNS = {
    "tokens_per_second": "Tokens per second",
    "gradient_norm": "Gradient norm",
    "learning_rate": "Learning rate",
    "noise_scale": "Gradient noise scale (tokens)",
    "accuracy": "Accuracy",
}


def names_of(runs: Sequence[Run]) -> list[str]:
    """A name for each run: its folder's; where two are called alike, with as many folders above as tell them apart."""
    depth = 1
    while True:
        names = ["/".join(run.path.parts[-depth:]) for run in runs]
        if len(set(names)) == len(names) or depth >= max(len(run.path.parts) for run in runs):
            return names
        depth += 1


def figures_table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """The header, and a row for each run: where it stands."""
    found = [figures_of(run) for run in runs]
    columns = list(dict.fromkeys(name for figures in found for name in figures))
    rows = [
        [name, f"{run.rows[-1]['step']:,}", *(figures.get(column, _ABSENT) for column in columns)]
        for name, run, figures in zip(names_of(runs), runs, found, strict=True)
    ]
    return ["run", "step", *columns], rows


def differences(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """The header, and a row for each setting in which the runs are not all alike."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    rows = []
    for key in keys:
        values = [shown(run.settings[key]) if key in run.settings else _ABSENT for run in runs]
        if len(set(values)) > 1 and key not in _NOT_COMPARED:
            rows.append([key, *values])
    return ["setting", *names_of(runs)], rows


def write_comparison(runs: Sequence[Run], html: str | os.PathLike[str], png: str | os.PathLike[str]) -> None:
    """Writes the page and its main picture, each whole or not at all.

    Raises:
      OSError: a file cannot be written.
    """
    names = names_of(runs)
    figure = new_figure(15.0, 4.6)
    for axes, over in zip(figure.subplots(1, len(_AXES), sharey=True), _AXES, strict=True):
        _draw_loss(axes, runs, names, over, labelled=over == "tokens")
    write_png(figure, png)
    pictures = []
    for index, panel in enumerate(_panels(runs, names)):
        pictures.append(Picture(panel.title, to_svg(panel.figure(), f"c{index}"), panel.note, panel.wide))
    header, rows = figures_table(runs)
    changed, settings = differences(runs)
    colours = [THEMED[PALETTE[index % len(PALETTE)]] for index in range(len(runs))]
    where = [[name, str(run.path), run.summary.get("device", "")] for name, run in zip(names, runs, strict=True)]
    tables = [
        Table("Where they stand", rows, header, numbers=True, colours=colours),
        Table("Settings that differ", settings, changed) if settings else Table("No settings differ", []),
        Table("Folders", where, folded=True),
    ]
    page = Page(" · ".join(names), [(f"{len(runs)} runs", "")], {}, pictures, tables)
    write_whole(html, to_html(page).encode())


def _panels(runs: Sequence[Run], names: Sequence[str]) -> Iterator[Panel]:
    note = "training, smoothed; dots: held-out"
    yield Panel("Loss against tokens", lambda axes: _draw_loss(axes, runs, names, "tokens", labelled=True), note, True)
    yield Panel("Loss against steps", lambda axes: _draw_loss(axes, runs, names, "step"), note)
    if any(np.isfinite(run.seconds).any() for run in runs):
        note = "without compiling and evaluating"
        yield Panel("Loss against time", lambda axes: _draw_loss(axes, runs, names, "seconds"), note)
    for column, title in _COLUMNS.items():
        if any(run.column(column)[0].size for run in runs):
            yield Panel(title, functools.partial(_draw_column, runs=runs, column=column))


def _draw_loss(axes: Any, runs: Sequence[Run], names: Sequence[str], over: str, *, labelled: bool = False) -> None:
    from matplotlib.ticker import FuncFormatter, MultipleLocator

    style(axes)
    tops = []
    for run, name, colour in zip(runs, names, _colours(runs), strict=True):
        places: Any = {"tokens": run.tokens, "step": [row["step"] for row in run.rows], "seconds": run.seconds}[over]
        by_step = dict(zip([row["step"] for row in run.rows], map(float, places), strict=True))
        rows = [row for row in thinned(run.rows) if row.get("loss") is not None and np.isfinite(row["loss"])]
        x, loss = np.array([by_step[row["step"]] for row in rows]), np.array([row["loss"] for row in rows], float)
        trend = trend_of(loss)
        axes.plot(x, trend, color=colour, linewidth=1.8, label=name)
        evaluated = [row for row in run.rows if row.get("eval_loss") is not None]
        at, heldout = [by_step[row["step"]] for row in evaluated], [row["eval_loss"] for row in evaluated]
        axes.plot(at, heldout, color=colour, marker="o", markersize=4.5, linestyle="none", markeredgecolor="white")
        if trend.size:
            tops.append(trend[max(0, len(trend) // 50)])
    lowest = axes.get_ylim()[0]
    if tops:
        axes.set_ylim(top=max(tops) + 0.05 * (max(tops) - lowest))  # a run that diverges must not flatten the rest
    written = round_number if over == "tokens" else duration if over == "seconds" else "{:,.0f}".format
    if over == "seconds":
        longest = axes.get_xlim()[1]
        axes.xaxis.set_major_locator(MultipleLocator(next((t for t in _TICKS if longest < 6 * t), _TICKS[-1])))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: written(value) if value > 0 else "0"))
    axes.set_xlabel(_AXES[over], color=INK)
    if labelled:
        axes.set_ylabel("loss (nats)", color=INK)
        axes.legend(fontsize=9, frameon=False)


def _draw_column(axes: Any, runs: Sequence[Run], column: str) -> None:
    from matplotlib.ticker import FuncFormatter

    style(axes)
    for run, colour in zip(runs, _colours(runs), strict=True):
        rows = thinned([row for row in run.rows if row.get(column) is not None])
        values = np.array([row[column] for row in rows], float)
        values = smooth(values, 2 * (values.size // 50) + 1) if column == "gradient_norm" else values
        axes.plot(run_tokens(run, rows), values, color=colour, linewidth=1.6)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value) if value > 0 else "0"))
    if column in ("tokens_per_second", "noise_scale"):
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value) if value > 0 else "0"))
    if column in ("tokens_per_second", "learning_rate"):
        axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens", color=GREY)


def run_tokens(run: Run, rows: Sequence[Any]) -> list[float]:
    """Tokens seen until each of ``rows``, which are some of the run's."""
    seen = {row["step"]: tokens for row, tokens in zip(run.rows, run.tokens, strict=True)}
    return [float(seen[row["step"]]) for row in rows]


def _colours(runs: Sequence[Run]) -> list[str]:
    return [PALETTE[index % len(PALETTE)] for index in range(len(runs))]
