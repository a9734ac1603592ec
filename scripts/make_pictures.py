"""Makes the README's pictures from a real quickstart: its terminal output, and its curves."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import app
from absl import flags

_USAGE = """
Makes docs/pictures from a quickstart that was really run: what it printed, and what metrics.jsonl says.

  make quickstart 2>&1 | tee runs/quickstart.log
  python scripts/make_pictures.py --log=runs/quickstart.log --run=runs/quickstart
"""
_WIDTH = 100
# Progress comes every few seconds: of its lines, so many are shown at the beginning and so many at the end.
_FIRST, _LAST = 4, 3
_STEP = re.compile(r"step [\d,]+/[\d,]+ ")
_STYLES = (
    (r"^\$ .*", "bold"),
    (r"^step [\d,]+/[\d,]+", "cyan"),
    (r"^(this model.*?)(?=  the model|$)", "bold green"),
    (r"^(xz|gzip) -9 .*", "dim"),
    (r"^─+.*", "dim"),
    (r"^(trained|speed|model|device|memory|checkpoint|metrics|TensorBoard|loss curve|report|samples)(?=  )", "dim"),
    (r"^\.\.\.$", "dim"),
)

if __name__ == "__main__":
    flags.DEFINE_string("log", None, "what make quickstart printed, both streams")
    flags.DEFINE_string("run", "runs/quickstart", "its work directory")
    flags.DEFINE_string("output", "docs/pictures", "folder of the pictures")


def main() -> None:
    """Reads the flags, draws, writes."""
    from ml.errors import UserError
    from ml.train.reporting import read_run
    from ml.train.reporting.figure import to_image, write_whole
    from ml.train.reporting.panels import panels_of

    output = Path(flags.FLAGS.output)
    output.mkdir(parents=True, exist_ok=True)
    run = read_run(flags.FLAGS.run)
    if flags.FLAGS.log:
        log = Path(flags.FLAGS.log)
        if not log.is_file():
            raise UserError(f"--log={log}: there is no such file; make it with: make quickstart 2>&1 | tee {log}")
        # Where `make quickstart` itself would have put it.
        text = log.read_text().replace(str(run.path), "runs/quickstart").replace(flags.FLAGS.run, "runs/quickstart")
        svg = recording(text)
        write_whole(output / "quickstart.svg", svg.encode())
        print(output / "quickstart.svg")
    for panel in panels_of(run):
        name = {"Loss": "loss", "Trust ratios by layer": "trust_ratios"}.get(panel.title)
        if name is not None:
            write_whole(output / f"{name}.svg", to_image(panel.figure(), name).encode())
            print(output / f"{name}.svg")


def recording(log: str) -> str:
    """What was printed, as an SVG of a terminal; progress is thinned."""
    from io import StringIO

    from rich.console import Console
    from rich.terminal_theme import MONOKAI
    from rich.text import Text

    console = Console(record=True, width=_WIDTH, file=StringIO(), highlight=False)
    for line in ["$ make quickstart", *_thinned(log.splitlines())]:
        text = Text.from_ansi(line)
        for pattern, style in _STYLES:
            text.highlight_regex(pattern, style)
        console.print(text, overflow="ellipsis", no_wrap=True)
    svg = console.export_svg(title="make quickstart", theme=MONOKAI, unique_id="quickstart")
    svg = re.sub(r"<!--.*?-->|@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # letters that come over the network
    return svg.replace("Fira Code", 'ui-monospace, Menlo, Consolas, "DejaVu Sans Mono"').replace("\n\n", "\n")


def _thinned(lines: Sequence[str]) -> Iterator[str]:
    """All that tells something; of the lines of progress the first and the last."""
    steps = [index for index, line in enumerate(lines) if _STEP.match(line)]
    hidden = set(steps[_FIRST : len(steps) - _LAST])
    told = ("going on from", "memory: ", "step ")  # before that the environment is made
    begin = next((index for index, line in enumerate(lines) if line.startswith(told)), 0)
    blank = False
    for index, line in enumerate(lines[begin:], begin):
        if index in hidden:
            if index == min(hidden):
                yield "..."
            continue
        if line.startswith(("real\t", "user\t", "sys\t", "make")) or (blank and not line.strip()):
            continue
        blank = not line.strip()
        yield line


if __name__ == "__main__":
    app.run(main, usage=_USAGE)
