"""``loss.png``: a run in one picture."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ml.train.reporting.figure import BLUE, GREEN, GREY, INK, ORANGE, RED, new_figure, style, write_png
from ml.train.reporting.progress import short_number
from ml.train.reporting.run import counting_tokens

# So few values are drawn as they are.
_FEW = 30


def plot_loss(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], *, title: str | None = None) -> None:
    """Draws loss, learning rate and gradient norm over steps, and writes a PNG (atomically).

    Args:
      rows: of `read_metrics`, ascending in ``step``. Read where present: ``loss`` and ``eval_loss`` (nats per token,
        or per image, or per pair), ``learning_rate``, ``gradient_norm``, and for the axis on top ``tokens_seen`` (or
        ``images_seen``, or the sum of ``tokens``, those of a step).
      path: where to write; parent directories must exist.
      title: above the picture.

    Raises:
      OSError: the file cannot be written.
    """
    unit, rows = counting_tokens(rows)
    figure = new_figure(9.6, 6.4)
    steps = np.array([row["step"] for row in rows], dtype=float)
    lower = any(finite(rows, key)[0].size for key in ("learning_rate", "gradient_norm"))
    if lower:
        loss_axes, lower_axes = figure.subplots(2, 1, sharex=True, height_ratios=[2.6, 1])
        _draw_rate_and_norm(lower_axes, rows)
    else:
        loss_axes = figure.subplots()
    bottom = lower_axes if lower else loss_axes
    draw_loss(loss_axes, rows, unit)
    if steps.size:
        bottom.set_xlim(min(steps[0], 1) if steps.size > 1 else steps[0] - 1, max(steps[-1], steps[0] + 1))
    tokens_on_top(loss_axes, rows, unit)
    bottom.set_xlabel("step", fontsize=12, color=INK)
    if title:
        figure.suptitle(title, fontsize=14, color=INK)

    write_png(figure, path)


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Centered mean over ``width`` neighbours (fewer at the ends, alike on both sides), so that nothing is shifted.

    Args:
      values: ``[n]``.
      width: odd number of values.
    """
    half = np.minimum(width // 2, np.minimum(np.arange(len(values)), np.arange(len(values))[::-1]))
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    return (total[index + half + 1] - total[index - half]) / (2 * half + 1)


def trend_of(loss: np.ndarray) -> np.ndarray:
    """The curve behind a noisy loss ``[n]``, without spikes; a few values are their own trend."""
    return loss if loss.size < _FEW else smooth(_without_spikes(loss), 2 * (loss.size // 50) + 3)


def _without_spikes(values: np.ndarray) -> np.ndarray:
    """Median of each value and its two neighbours on either side: one bad step must not lift a whole stretch."""
    padded = np.pad(values, 2, mode="edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, 5), axis=-1)


def finite(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows that hold a finite ``key``."""
    points = [(row["step"], float(row[key])) for row in rows if row.get(key) is not None]
    points = [(step, value) for step, value in points if math.isfinite(value)]
    return np.array([p[0] for p in points], dtype=float), np.array([p[1] for p in points], dtype=float)


def draw_loss(axes: Any, rows: Sequence[Mapping[str, Any]], unit: str = "tokens") -> None:
    """Loss over steps, each and smoothed, and the held-out loss; ``unit`` is what it is averaged over."""
    steps, loss = finite(rows, "loss")
    heldout_steps, heldout = finite(rows, "eval_loss")
    trend = trend_of(loss)
    if loss.size < _FEW:
        axes.plot(steps, loss, color=BLUE, linewidth=1.8, label="training", zorder=3)
    else:
        axes.plot(steps, loss, color=BLUE, alpha=0.35, linewidth=0.8, label="training, each step", zorder=2)
        axes.plot(steps, trend, color=BLUE, linewidth=2.0, label="training, smoothed", zorder=3)
    if heldout.size:
        marks = {"color": ORANGE, "marker": "o", "markersize": 6, "linewidth": 1.2, "markeredgecolor": "white"}
        axes.plot(heldout_steps, heldout, label="held-out", zorder=4, clip_on=False, **marks)
        axes.annotate(
            f"{heldout[-1]:.3f}",
            (heldout_steps[-1], heldout[-1]),
            xytext=(0, 9),
            textcoords="offset points",
            ha="right",
            fontsize=12,
            color=ORANGE,
            fontweight="bold",
        )
    if loss.size:
        # One spike must not flatten the whole curve.
        top = max(trend.max(), np.percentile(loss, 99.5), heldout.max(initial=-np.inf))
        bottom = min(np.percentile(loss, 0.2), trend.min(), heldout.min(initial=np.inf))
        margin = 0.05 * (top - bottom) or 0.1
        axes.set_ylim(bottom - margin, top + margin)
    step_style(axes)
    axes.set_ylabel(f"loss (nats per {unit.removesuffix('s')})", fontsize=12, color=INK)
    if loss.size or heldout.size:
        axes.legend(loc="upper right", fontsize=11, frameon=False)


def _draw_rate_and_norm(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.ticker import MaxNLocator

    step_style(axes)
    steps, rate = finite(rows, "learning_rate")
    if rate.size:
        axes.plot(steps, rate, color=GREEN, linewidth=1.8)
        axes.set_ylim(0, rate.max() * 1.08 or 1)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    axes.set_ylabel("learning rate", fontsize=12, color=GREEN)
    axes.tick_params(axis="y", colors=GREEN)

    steps, norm = finite(rows, "gradient_norm")
    if not norm.size:
        return
    right = axes.twinx()
    right.plot(steps, norm, color=RED, alpha=0.8, linewidth=0.9)
    if norm.min() > 0 and norm.max() > 20 * np.median(norm):
        right.set_yscale("log")
    else:
        right.set_ylim(0, np.percentile(norm, 99.5) * 1.15 or 1)
        right.yaxis.set_major_locator(MaxNLocator(3, prune="lower"))  # a 0 would lie on the last step's number
    right.set_ylabel("gradient norm", fontsize=12, color=RED)
    right.tick_params(axis="y", colors=RED, labelsize=11, length=0)
    for spine in right.spines.values():
        spine.set_visible(False)


def tokens_on_top(axes: Any, rows: Sequence[Mapping[str, Any]], unit: str = "tokens") -> None:
    """A second axis that tells how many tokens (or what ``unit`` says) had been seen; ticks lie at round numbers."""
    from matplotlib.ticker import MaxNLocator

    steps, seen = finite(rows, "tokens_seen")
    if not seen.size:
        steps, tokens = finite(rows, "tokens")
        seen = np.cumsum(tokens)
    if steps.size < 2 or not seen[-1]:
        return
    ticks = [tick for tick in MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(0, seen[-1]) if 0 < tick <= seen[-1]]
    top = axes.secondary_xaxis("top")
    top.set_ticks(np.interp(ticks, seen, steps), [round_number(tick) for tick in ticks])
    top.tick_params(colors=GREY, labelsize=11, length=3)
    top.spines["top"].set_visible(False)
    top.set_xlabel(f"training {unit}", fontsize=12, color=GREY)


def round_number(value: float) -> str:
    """`short_number` without idle zeros: ``2.5M``, ``10M``."""
    text = short_number(value)
    digits = text.rstrip("kMBT")
    return (digits.rstrip("0").rstrip(".") if "." in digits else digits) + text[len(digits) :]


def step_style(axes: Any) -> None:
    """`style`, with steps along the bottom."""
    from matplotlib.ticker import FuncFormatter

    style(axes)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
