"""A run as it lies in its folder: rows of metrics, the experiment's settings, and how it ended."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ml.errors import UserError
from ml.train.reporting.metrics_file import read_metrics

METRICS, EXPERIMENT, SUMMARY = "metrics.jsonl", "experiment.json", "summary.json"
TRUST_RATIO = "trust_ratio/"
"""What the names of the columns with layers' trust ratios begin with."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What pictures and tables of a run are made from.

    Attributes:
      path: its folder.
      rows: of `read_metrics`, ascending in ``step``; at least one. What is counted is named ``tokens`` in all of them.
      settings: of the experiment: dotted key -> value.
      summary: of `ml.train.closing`; empty: the run has not ended, or was killed.
      unit: what ``tokens`` are: ``images`` where the model learns from those.
    """

    path: pathlib.Path
    rows: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any]
    summary: Mapping[str, Any]
    unit: str = "tokens"

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps ``[n]`` and values ``[n, ...]`` of the rows that hold ``name``."""
        rows = [row for row in self.rows if row.get(name) is not None]
        return np.array([row["step"] for row in rows], float), np.array([row[name] for row in rows], float)

    @property
    def seconds(self) -> np.ndarray:
        """Time spent in steps until each row, ``[rows]``, from the recorded speed; without compiling and evaluating."""
        speed = np.array([row.get("tokens_per_second", np.nan) for row in self.rows], float)
        known = np.flatnonzero(speed > 0)
        if not known.size:
            return np.full(len(self.rows), np.nan)
        index = np.arange(len(speed))
        speed = speed[known[np.minimum(np.searchsorted(known, index), known.size - 1)]]  # else that of the next row
        return np.cumsum(np.diff(self.tokens, prepend=0.0) / speed)

    @property
    def tokens(self) -> np.ndarray:
        """Tokens trained on until each row, ``[rows]``."""
        if "tokens_seen" in self.rows[-1]:
            return np.array([row.get("tokens_seen", 0) for row in self.rows], float)
        return np.cumsum([row.get("tokens", 0) for row in self.rows], dtype=float)

    def trust_ratios(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """For each kind of parameter steps ``[n]`` and its tensors' ratios ``[n, tensors]``."""
        names = sorted({name for row in self.rows for name in row if name.startswith(TRUST_RATIO)})
        found = {}
        for name in names:
            steps, values = self.column(name)
            short = name.removeprefix(TRUST_RATIO).removeprefix("layers/").removesuffix("/kernel")
            found[short.removesuffix("/embedding")] = steps, values.reshape(len(steps), -1)
        return found


def read_run(path: str | os.PathLike[str]) -> Run:
    """Reads the folder of a training run, ended or under way.

    Raises:
      UserError: there is no such folder, it is of no run, or a file there is damaged.
    """
    folder = pathlib.Path(path).expanduser()
    if not folder.is_dir():
        beside = sorted(p.parent.name for p in folder.parent.glob(f"*/{METRICS}")) if folder.parent.is_dir() else []
        hint = f"runs in {folder.parent}: {', '.join(beside)}" if beside else "give the --workdir of a training run"
        raise UserError(f"{path}: there is no such folder; {hint}")
    if not (folder / METRICS).is_file():
        below = sorted(str(p.parent.relative_to(folder)) for p in folder.glob(f"*/{METRICS}"))
        hint = f"did you mean one of its folders: {', '.join(below)}?" if below else "give the --workdir of a run"
        raise UserError(f"{path} is no folder of a training run: it lacks {METRICS}; {hint}")
    rows: Sequence[Mapping[str, Any]] = read_metrics(folder / METRICS)
    if not rows:
        raise UserError(f"{folder / METRICS} has no rows yet; wait for the run's first step")
    settings = _read_json(folder / EXPERIMENT) if (folder / EXPERIMENT).is_file() else {}
    summary = _read_json(folder / SUMMARY) if (folder / SUMMARY).is_file() else {}
    unit, rows = counting_tokens(rows)
    return Run(folder.resolve(), rows, dict(flattened(settings)) if settings else {}, summary, unit)


def counting_tokens(rows: Sequence[Mapping[str, Any]]) -> tuple[str, Sequence[Mapping[str, Any]]]:
    """What a run counts, and its rows with that called tokens: curves of text and of images are drawn alike."""
    last = rows[-1] if rows else {}
    unit = next((name for name in last if f"{name}_seen" in last), "tokens")
    if unit == "tokens":
        return unit, rows
    names = {unit: "tokens"} | {f"{unit}_{what}": f"tokens_{what}" for what in ("seen", "per_second")}
    return unit, [{names.get(name, name): value for name, value in row.items()} for row in rows]


def flattened(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything in nested mappings and in lists of mappings."""
    if isinstance(values, Mapping) and values:
        for key, value in values.items():
            yield from flattened(value, f"{path}.{key}" if path else key)
    elif isinstance(values, list) and values and all(isinstance(value, Mapping) for value in values):
        for index, value in enumerate(values):
            yield from flattened(value, f"{path}[{index}]")
    else:
        yield path, values


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error}); restore or remove it") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a JSON object; restore or remove it")
    return values
