"""The folder of one run: its paths, and the check that it belongs to this experiment."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml.config import to_dict
from ml.errors import UserError
from ml.train.config import ExperimentConfig

# What may change when a run is resumed: how fast, how often and how long, but neither the model nor what it has learned from.
_MAY_CHANGE = (
    "train.steps",
    "train.microbatches",
    "train.dtype",
    "train.remat",
    "train.attention",
    "train.loss_chunk",
    "train.nonfinite",
    "train.log_every",
    "eval",
    "checkpoint",
    "mesh",
    "data.num_workers",
    "data.cache_dir",
)


class Workdir:
    """Paths of a run's files."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path).expanduser().absolute()
        self.experiment = self.path / "experiment.json"
        self.tokenizer = self.path / "tokenizer.json"
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.loss_plot = self.path / "loss.png"

    def claim(self, config: ExperimentConfig) -> list[str]:
        """Makes the folder this experiment's, or finds that it is.

        Returns:
          The changes since the last start, as text, of settings that may change between starts.

        Raises:
          UserError: the folder holds another experiment (names the first difference), or cannot be written.
        """
        new = to_dict(config)
        changes = []
        if self.experiment.is_file():
            try:
                old = json.loads(self.experiment.read_text())
            except json.JSONDecodeError as error:
                raise UserError(f"{self.experiment}:{error.lineno}: malformed JSON; use another --workdir") from None
            for key, before, after in _differences(old, json.loads(json.dumps(new))):
                if not any(key == allowed or key.startswith(f"{allowed}.") for allowed in _MAY_CHANGE):
                    raise UserError(
                        f"--workdir={self.path} holds a run with config.{key}={before}, but now it is {after}; "
                        "use another --workdir, or restore the value"
                    )
                changes.append(f"config.{key}: {before} -> {after}")
        elif self.path.is_dir() and any(self.checkpoints.glob("[0-9]*")):
            raise UserError(f"--workdir={self.path} holds checkpoints of an unknown run; use another --workdir")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            partial = self.experiment.with_suffix(".tmp")
            partial.write_text(json.dumps(new, indent=2) + "\n")
            os.replace(partial, self.experiment)
        except (PermissionError, NotADirectoryError, FileExistsError) as error:
            raise UserError(f"--workdir={self.path} cannot be written: {error.strerror}; choose another folder") from None
        return changes


def _differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields (dotted key, old value, new value) wherever two nested mappings differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield path, old, new
