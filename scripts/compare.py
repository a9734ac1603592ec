"""Lays training runs over one another: loss against tokens, steps and time; which settings differ."""

from pathlib import Path

import app
from absl import flags

_USAGE = """
Compares training runs: prints where they stand and which settings differ, writes a page and a picture of their curves.
Runs may still be under way. One run alone: its report is made again.

  python scripts/compare.py runs/lamb runs/adamw
  python scripts/compare.py runs/* --output=docs/lamb_against_adamw.html
"""

if __name__ == "__main__":
    flags.DEFINE_string("output", "comparison.html", "the page; the picture gets its name with .png")


def main(paths: list[str]) -> None:
    """Reads the runs, prints, writes."""
    from rich.console import Console

    from ml.errors import UserError
    from ml.train.reporting import read_run, write_report
    from ml.train.reporting.comparison import differences, figures_table, write_comparison

    if not paths:
        raise UserError("no runs are given; name their work directories, as in compare.py runs/first runs/second")
    page = Path(flags.FLAGS.output).absolute()
    if page.suffix != ".html":
        raise UserError(f"--output={flags.FLAGS.output}: give it a name that ends in .html")
    if not page.parent.is_dir():
        raise UserError(f"--output={flags.FLAGS.output}: there is no such folder; make it first")
    runs = [read_run(path) for path in paths]
    if len({run.path for run in runs}) < len(runs):
        raise UserError("a run is given twice; name each work directory once")
    console = Console()
    _print_table(console, *figures_table(runs))
    if len(runs) == 1:
        write_report(runs[0], runs[0].path / "report.html")
        print(runs[0].path / "report.html")
        return
    header, settings = differences(runs)
    if settings:
        _print_table(console, header, settings)
    else:
        print("no settings differ")
    write_comparison(runs, page, page.with_suffix(".png"))
    print(page)
    print(page.with_suffix(".png"))


def _print_table(console, header: list[str], rows: list[list[str]]) -> None:
    from rich.table import Table

    # A table wider than the screen would be cut; its columns become rows then.
    if sum(max(map(len, column)) + 3 for column in zip(header, *rows, strict=True)) > console.width:
        header, *rows = ([*line] for line in zip(header, *rows, strict=True))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print()


if __name__ == "__main__":
    app.run(main, usage=_USAGE, takes_words=True)
