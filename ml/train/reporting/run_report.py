"""``report.html``: a run in one page that needs no network."""

import os
from collections.abc import Mapping
from typing import Any

from ml.train.reporting.figure import to_svg, write_whole
from ml.train.reporting.page import Page, Picture, Table, to_html
from ml.train.reporting.panels import Panel, panels_of
from ml.train.reporting.progress import duration, short_number
from ml.train.reporting.run import Run


def write_report(run: Run, path: str | os.PathLike[str]) -> None:
    """Writes the report of ``run``, whole or not at all.

    Raises:
      OSError: the file cannot be written.
    """
    page = Page(
        title=run.name,
        lead=_lead(run),
        tiles=figures_of(run),
        pictures=[_picture(panel, f"p{index}") for index, panel in enumerate(panels_of(run))],
        tables=_tables(run),
    )
    write_whole(path, to_html(page).encode())


def _picture(panel: Panel, name: str) -> Picture:
    return Picture(panel.title, to_svg(panel.figure(), name), panel.note, panel.wide)


def _lead(run: Run) -> list[tuple[str, str]]:
    summary, last = run.summary, run.rows[-1]
    ended = summary.get("ended", "under way")
    state = f"{ended}: {summary['reason']}" if summary.get("reason") else ended
    steps = f"step {last['step']:,} of {run.settings.get('train.steps', last['step']):,}"
    lead = [(state, "bad" if ended == "failed" else ""), (steps, "")]
    if summary.get("ended_at"):
        lead.append((f"ended {summary['ended_at']}", ""))
    return lead


def figures_of(run: Run) -> dict[str, str]:
    """The figures that a run is judged by: name -> value, as text."""
    summary, last = run.summary, run.rows[-1]
    heldout: Mapping[str, float] = summary.get("heldout") or {}
    evaluated = [row["eval_loss"] for row in run.rows if "eval_loss" in row]
    figures = {}
    if "loss" in heldout or evaluated:
        figures["held-out loss"] = f"{heldout['loss'] if 'loss' in heldout else evaluated[-1]:.4f}"
    if "bits_per_byte" in heldout:
        figures["bits per byte"] = f"{heldout['bits_per_byte']:.3f}"
    for name, value in heldout.items():
        if name not in ("loss", "bits_per_byte"):
            figures[f"held-out {name.replace('_', ' ')}"] = f"{value:.4g}"
    if "loss" in last:
        figures["training loss"] = f"{last['loss']:.4f}"
    figures[run.unit] = short_number(float(run.tokens[-1]))
    speeds = [row["tokens_per_second"] for row in run.rows if "tokens_per_second" in row]
    if speeds:
        figures[f"{run.unit}/s"] = short_number(float(sorted(speeds)[len(speeds) // 2]))
        figures["time in steps"] = duration(float(run.seconds[-1]))
    shares = sorted(row["mfu"] for row in run.rows if "mfu" in row)
    if shares:
        figures["MFU"] = f"{shares[len(shares) // 2]:.1%}"
    if summary.get("parameters"):
        figures["parameters"] = short_number(summary["parameters"])
    memory = summary.get("memory")
    if memory:
        figures["memory a device"] = f"{(memory.get('measured_peak') or memory['predicted']) / 2**20:,.0f} MiB"
    if last.get("skipped"):
        figures["skipped steps"] = f"{last['skipped']:,}"
    return figures


def _tables(run: Run) -> list[Table]:
    summary = run.summary
    about: dict[str, Any] = {"folder": run.path}
    for name in ("device", "processes", "began_at", "ended_at", "command"):
        if summary.get(name):
            about[name.replace("_", " ")] = summary[name]
    about |= summary.get("versions") or {}
    tables = [Table("Where and with what", [(name, str(value)) for name, value in about.items()])]
    groups: dict[str, list[tuple[str, str]]] = {}
    for key, value in run.settings.items():
        group, _, rest = key.partition(".")
        groups.setdefault(group if rest else "experiment", []).append((rest or key, shown(value)))
    tables += [Table(f"Settings: {name}", rows, folded=True) for name, rows in groups.items()]
    return tables


def shown(value: Any) -> str:
    """A setting as one would type it."""
    return str(value).lower() if isinstance(value, bool | None) else str(value)
