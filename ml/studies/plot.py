"""An outcome as a picture: its panels side by side, the claim and the verdict above."""

import textwrap
from itertools import cycle
from pathlib import Path
from typing import Any

from ml.studies.outcome import Outcome, Panel
from ml.train.reporting.figure import BLUE, GREEN, GREY, INK, ORANGE, RED, new_figure, style, write_png

_COLOURS, _MARKERS = (BLUE, ORANGE, GREEN, RED, GREY), "osD^vP"


def plot_outcome(outcome: Outcome, path: Path) -> None:
    """Draws the panels of ``outcome`` (there must be one) and writes a PNG, whole or not at all."""
    width = 6.4 * len(outcome.panels)
    figure = new_figure(width, 5.0)
    for axes, panel in zip(figure.subplots(1, len(outcome.panels), squeeze=False)[0], outcome.panels, strict=True):
        _draw(axes, panel)
    verdict = "holds here" if outcome.holds else "does not hold here"
    title = "\n".join(textwrap.wrap(f"{outcome.claim.rstrip('.')}: {verdict}", round(9.5 * width)))
    figure.suptitle(title, fontsize=12, color=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(figure, path)


def _draw(axes: Any, panel: Panel) -> None:
    style(axes)
    for series, colour, marker in zip(panel.series, cycle(_COLOURS), cycle(_MARKERS), strict=False):
        axes.errorbar(
            series.x,
            series.y,
            yerr=series.spread or None,
            label=series.name,
            color=colour,
            marker=marker,
            markersize=5,
            linestyle="none" if series.marks_only else "-",
            linewidth=1.6,
            capsize=3,
        )
    if panel.x_log:
        axes.set_xscale("log", base=2)
        _plain_ticks(axes.xaxis, [x for series in panel.series for x in series.x])
    if panel.y_log:
        axes.set_yscale("log")
    axes.set_title(panel.title, fontsize=12, color=INK)
    axes.set_xlabel(panel.x_label, fontsize=12, color=INK)
    axes.set_ylabel(panel.y_label, fontsize=12, color=INK)
    axes.legend(fontsize=11, frameon=False)


def _plain_ticks(axis: Any, values: list[float]) -> None:
    """Ticks where the measurements are, if they are few, written as numbers and not as powers."""
    from matplotlib.ticker import FuncFormatter

    if len(set(values)) <= 8:
        axis.set_ticks(sorted(set(values)))
        axis.set_ticks([], minor=True)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}"))
