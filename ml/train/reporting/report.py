"""The closing report of a run: how well, how fast, and where everything lies."""

import dataclasses
import gzip
import lzma
import os
from collections.abc import Callable, Iterable, Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ml.train.reporting.progress import duration, short_number

_BAR_WIDTH = 24


@dataclasses.dataclass(frozen=True)
class Report:
    """What a finished run has to tell.

    Attributes:
      bits_per_byte: of the model on held-out text; ``None``: not evaluated.
      gzip_bits_per_byte, xz_bits_per_byte: of the same text; ``None``: left out.
      heldout_bytes: size of that text.
      steps: steps done.
      tokens: tokens trained on, in all.
      tokens_per_second: training speed.
      seconds: wall time.
      parameters: number of trained parameters.
      device: such as ``8 x TPU v5p``.
      flops_utilization: model FLOPs utilization, in [0, 1]; ``None``: unknown.
      memory: of a device, by category; ``None``: unknown.
      files: what lies where: label -> path, in the order to show.
      sample: a text that the model wrote.
      heldout: of a model that codes no text, what else was measured on held-out text: name -> value.
      unit: what ``tokens`` counts.
      broken: images that could not be read in training, in whose place others stood.
    """

    bits_per_byte: float | None
    gzip_bits_per_byte: float | None
    xz_bits_per_byte: float | None
    heldout_bytes: int
    steps: int
    tokens: int
    tokens_per_second: float
    seconds: float
    parameters: int
    device: str
    flops_utilization: float | None = None
    memory: str | None = None
    files: Mapping[str, str | os.PathLike[str]] = dataclasses.field(default_factory=dict)
    sample: str | None = None
    heldout: Mapping[str, float] = dataclasses.field(default_factory=dict)
    unit: str = "tokens"
    broken: int = 0


def gzip_bits_per_byte(texts: Iterable[bytes]) -> float:
    """Bits that ``gzip -9`` needs for a byte of the concatenated texts, header included.

    Raises:
      ValueError: the texts are empty.
    """
    return _bits_per_byte(texts, lambda text: gzip.compress(text, compresslevel=9, mtime=0))


def xz_bits_per_byte(texts: Iterable[bytes]) -> float:
    """Bits that ``xz -9`` needs for a byte of the concatenated texts, header included.

    Raises:
      ValueError: the texts are empty.
    """
    return _bits_per_byte(texts, lambda text: lzma.compress(text, format=lzma.FORMAT_XZ, preset=9))


def print_report(report: Report, console: Console) -> None:
    """Prints the report: a comparison, the figures, and paths that a mouse can copy whole."""
    console.print()
    if report.sample:
        console.rule(Text("written by the model"), style="dim")
        console.print(Text(report.sample.rstrip("\n")))
    console.rule(Text("result"), style="dim")
    if report.bits_per_byte is not None:
        console.print(_comparison(report))
        console.print()

    figures = {
        "trained": f"{report.steps:,} steps, {short_number(report.tokens)} {report.unit} in {duration(report.seconds)}",
        "speed": f"{short_number(report.tokens_per_second)} {report.unit}/s",
        "model": f"{short_number(report.parameters)} parameters",
        "device": report.device,
    }
    if report.heldout:
        named = (f"{name.replace('_', ' ')} {value:.4g}" for name, value in report.heldout.items())
        figures = {"held-out": ", ".join(named)} | figures
    if report.broken:
        figures["broken"] = f"{report.broken:,} images could not be read; the log names them"
    if report.flops_utilization is not None:
        figures["speed"] += f", {report.flops_utilization:.1%} of the device's peak FLOP/s"
    if report.memory is not None:
        figures["memory"] = report.memory
    # Not a table: it would cut or fold long paths.
    lines = figures | {label: os.fspath(path) for label, path in report.files.items()}
    width = max(map(len, lines))
    for label, text in lines.items():
        console.print(
            Text.assemble((f"{label:<{width}}", "dim"), "  ", text), soft_wrap=True, highlight=False, overflow="ignore"
        )


def _comparison(report: Report) -> Table:
    assert report.bits_per_byte is not None
    entries = [("this model", report.bits_per_byte)]
    if report.xz_bits_per_byte is not None:
        entries.append(("xz -9", report.xz_bits_per_byte))
    if report.gzip_bits_per_byte is not None:
        entries.append(("gzip -9", report.gzip_bits_per_byte))
    longest = max(value for _, value in entries)
    table = Table(
        title=f"bits per byte on {_megabytes(report.heldout_bytes)} of held-out text (less is better)",
        title_justify="left",
        title_style="",
        box=None,
        show_header=False,
        padding=(0, 2, 0, 0),
    )
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    for name, value in sorted(entries, key=lambda entry: entry[1]):
        ours = name == "this model"
        bar = "█" * max(1, round(_BAR_WIDTH * value / longest))
        less = 1 - report.bits_per_byte / value
        against = "" if ours else f"the model needs {abs(less):.1%} {'less' if less > 0 else 'more'}"
        style = "bold green" if ours else ""
        table.add_row(Text(name, style), Text(f"{value:.3f}", style), Text(bar, style or "dim"), Text(against, "dim"))
    return table


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.2f} MB" if count >= 1e5 else f"{count:,} bytes"


def _bits_per_byte(texts: Iterable[bytes], compress: Callable[[bytes], bytes]) -> float:
    text = b"".join(texts)
    if not text:
        raise ValueError("no text to compress")
    return 8 * len(compress(text)) / len(text)
