"""The folder of one run: its paths, and the check that it belongs to this experiment."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ml.config import build, to_dict
from ml.errors import UserError
from ml.train.config import ExperimentConfig

# What may change when a run is resumed: how fast, how often and how long; neither the model nor what it learned from.
_MAY_CHANGE = (
    "train.steps",
    "train.microbatches",
    "train.dtype",
    "train.remat",
    "train.offload_optimizer",
    "train.attention",
    "train.context",
    "train.pipeline",
    "train.pipeline_chunks",
    "train.loss_chunk",
    "train.noise_scale",
    "train.nonfinite",
    "train.log_every",
    "eval",
    "checkpoint",
    "mesh",
    "health",
    "data.num_workers",
    "data.cache_dir",
)

# A network file system may show a new file to other machines only after a while.
_VISIBLE_SECONDS = 60.0


class Workdir:
    """Paths of a run's files."""

    def __init__(self, path: str | os.PathLike[str]):
        if "://" in os.fspath(path):
            raise UserError(f"--workdir={path}: a run's folder must lie in a file system; mount the bucket as one")
        self.path = Path(path).expanduser().absolute()
        self.experiment = self.path / "experiment.json"
        self.tokenizer = self.path / "tokenizer.json"
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.loss_plot = self.path / "loss.png"
        self.summary = self.path / "summary.json"
        self.report = self.path / "report.html"

    def check(self, config: ExperimentConfig) -> list[str]:
        """Finds out whether this experiment may run here; writes nothing.

        A folder without checkpoints, such as a mistyped first start leaves, belongs to no experiment yet.

        Returns:
          The changes since the last start, as text, of settings that may change between starts.

        Raises:
          UserError: the folder holds another experiment (names the first difference), or cannot be written.
        """
        self._check_writable()
        if not any(self.checkpoints.glob("[0-9]*")):
            return []
        if not self.experiment.is_file():
            raise UserError(f"--workdir={self.path} holds checkpoints of an unknown run; use another --workdir")
        changes = []
        for key, before, after in _differences(_plain(self.read_config()), _plain(config)):
            if not any(key == allowed or key.startswith(f"{allowed}.") for allowed in _MAY_CHANGE):
                raise UserError(
                    f"--workdir={self.path} holds a run with config.{key}={before}, but now it is {after}; "
                    "use another --workdir, or restore the value"
                )
            changes.append(f"config.{key}: {before} -> {after}")
        return changes

    def check_shared(self) -> None:
        """Finds out whether all processes of the run see the same folder; all must call this.

        Raises:
          UserError: some do not.
        """
        if jax.process_count() == 1:
            return
        mark = self.path / ".shared"
        if jax.process_index() == 0:
            self.path.mkdir(parents=True, exist_ok=True)
            mark.write_text(str(os.getpid()))
        written = str(multihost_utils.broadcast_one_to_all(np.int32(os.getpid())))
        end = time.monotonic() + _VISIBLE_SECONDS
        while not (seen := mark.is_file() and mark.read_text() == written) and time.monotonic() < end:
            time.sleep(0.1)
        blind = np.flatnonzero(~multihost_utils.process_allgather(np.bool_(seen)).ravel()).tolist()
        if jax.process_index() == 0:
            mark.unlink(missing_ok=True)
        if blind:
            who = ", ".join(map(str, blind))
            raise UserError(
                f"--workdir={self.path} is not the same folder on all machines: process {who} does not see what "
                "process 0 writes there; choose a folder in a file system that they share"
            )

    def claim(self, config: ExperimentConfig) -> None:
        """Makes the folder this experiment's.

        Raises:
          OSError: it cannot be written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        partial = self.experiment.with_name(f".{self.experiment.name}.{os.getpid()}")
        try:
            partial.write_text(json.dumps(to_dict(config), indent=2) + "\n")
            os.replace(partial, self.experiment)
        except OSError:
            partial.unlink(missing_ok=True)
            raise

    def _check_writable(self) -> None:
        there = next(folder for folder in (self.path, *self.path.parents) if folder.exists())
        problem = "it is a file" if not there.is_dir() else None if os.access(there, os.W_OK) else "no permission"
        if problem:
            raise UserError(f"--workdir={self.path} cannot be written ({there}: {problem}); choose another folder")

    def read_config(self) -> ExperimentConfig:
        """The experiment as it was last started; keys that are younger than the file stand at their defaults.

        Raises:
          UserError: the folder is of no training run.
        """
        mend = "restore the file, or use another --workdir"
        if not self.experiment.is_file():
            raise UserError(f"{self.path} is no folder of a training run: it lacks {self.experiment.name}")
        try:
            values = json.loads(self.experiment.read_text())
        except json.JSONDecodeError as error:
            raise UserError(f"{self.experiment}:{error.lineno}: malformed JSON; {mend}") from None
        except UnicodeDecodeError:
            raise UserError(f"{self.experiment}: not a text file; {mend}") from None
        if not isinstance(values, dict) or not values.keys() > {"model", "data", "optimizer"}:
            raise UserError(
                f"{self.experiment} is of no training run; use another --workdir (to start from a model that lies "
                "there, name it in config.train.init_from)"
            )
        return build(ExperimentConfig, values, f"{self.experiment}: config")


def _plain(config: ExperimentConfig) -> Any:
    return json.loads(json.dumps(to_dict(config)))


def _differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields (dotted key, old value, new value) wherever two nested mappings differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield path, old, new
