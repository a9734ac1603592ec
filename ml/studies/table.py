"""``docs/papers.md``: what papers claim, what was measured here, and what is here without a study yet."""

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from ml.studies.methods import METHODS
from ml.studies.outcome import Measured, Outcome
from ml.studies.record import Record, read_records, write_whole

_HEAD = """# Papers: what is claimed, and what we measured

Every row of the first table was measured by `python scripts/reproduce.py --study=NAME`, which also wrote this page;
the files behind it say command, device and versions. A claim that does not hold at our scale is shown as such.
"""
_METHODS_HEAD = """
## In the house, without a study yet

No claim of these papers was put to the test here.
"""


def write_table(folder: Path, path: Path) -> None:
    """Rebuilds the page at ``path`` from the records in ``folder``, whole or not at all.

    Raises:
      UserError: a file in ``folder`` that is not a record.
    """
    write_whole(path, table(read_records(folder), os.path.relpath(folder, path.parent)))


def table(records: Iterable[Record], folder: str) -> str:
    """The page as Markdown: a pure function of the records, so that it is the same wherever it is built.

    Args:
      records: of all studies.
      folder: where their files lie, as a link from the page.
    """
    records = sorted(records, key=lambda record: record.stem)
    rows: list[Mapping[str, str]] = [
        {
            "study": f"`{record.stem}`",
            "paper": _paper(record.outcome),
            "what we have": record.outcome.have,
            "claim": record.outcome.claim,
            "measured here": f"{measured(record.outcome)}; {_files(record, folder)}",
            "holds?": "yes" if record.outcome.holds else f"**no**: {record.outcome.reason}",
        }
        for record in records
    ]
    methods = [{"paper": m.paper, "what we have": f"{m.have}: [`{m.where}`](../{m.where})"} for m in METHODS]
    studied = _markdown(rows) if rows else "No study has been run yet.\n"
    details = "".join(f"\n**`{record.stem}`**, on {record.device}: {record.outcome.setup}\n" for record in records)
    how = "\n## How it was measured\n" + details if details else ""
    return _HEAD + "\n" + studied + how + _METHODS_HEAD + "\n" + _markdown(methods)


def measured(outcome: Outcome) -> str:
    """Both sides in words: ``LAMB 0.69 ± 0.02, AdamW 0.82 ± 0.03 nats per byte (3 seeds)``."""
    sides = f"{_side(outcome.ours)}, {_side(outcome.baseline)} {outcome.unit}"
    return f"{sides} ({len(outcome.seeds)} seeds)" if outcome.seeds else sides


def _side(side: Measured) -> str:
    if not side.spread:
        return f"{side.name} {_number(side.mean)}"
    # Two digits of the spread, and as many of the mean.
    digits = 1 - math.floor(math.log10(side.spread))
    if not 0 <= digits <= 4:
        return f"{side.name} {_number(side.mean)} ± {_number(side.spread)}"
    return f"{side.name} {side.mean:,.{digits}f} ± {side.spread:.{digits}f}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _paper(outcome: Outcome) -> str:
    return f"[{outcome.paper}]({outcome.url})" if outcome.url else outcome.paper


def _files(record: Record, folder: str) -> str:
    plot = f", [plot]({folder}/{record.stem}.png)" if record.outcome.panels else ""
    return f"[JSON]({folder}/{record.stem}.json){plot}"


def _markdown(rows: Iterable[Mapping[str, str]]) -> str:
    rows = list(rows)
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(_cell(text) for text in row.values()) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
