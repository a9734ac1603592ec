"""What a run leaves when it ends, however it ends: ``summary.json``, and ``report.html`` made from all its files."""

import dataclasses
import json
import shlex
import signal
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from ml import machine
from ml.train.evaluation import HeldoutLoss
from ml.train.memory import MemoryUse
from ml.train.reporting import read_run, write_report
from ml.train.reporting.figure import write_whole
from ml.train.setup import Parts
from ml.train.workdir import Workdir


class Closing:
    """Writes both files on leaving; a run is never lost for them: if that fails, one line says why.

    Attributes:
      memory: of a step, once it is compiled.
      heldout: loss on all held-out data, if the run came to that.
      interrupted: the signal that ended the run.
    """

    def __init__(self, workdir: Workdir):
        self._workdir, self._began_at = workdir, ""
        self.memory: MemoryUse | None = None
        self.heldout: HeldoutLoss | None = None
        self.interrupted: signal.Signals | None = None
        self._parameters = self._text_bytes = 0

    def begin(self, parts: Parts, parameters: int) -> None:
        """From now on the folder is this run's.

        Args:
          parts: of the run.
          parameters: how many there are.
        """
        self._began_at, self._parameters = _now(), parameters
        self._text_bytes = parts.prepared.heldout_bytes if parts.prepared.codes_text else 0

    def __enter__(self) -> "Closing":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._began_at or jax.process_index() != 0:
            return
        try:
            write_whole(self._workdir.summary, (json.dumps(self._summary(error), indent=2) + "\n").encode())
            write_report(read_run(self._workdir.path), self._workdir.report)
        except Exception as problem:
            what = " ".join(f"{type(problem).__name__}: {problem}".split())
            print(f"warning: {self._workdir.report} was not written ({what}); the run itself is whole", file=sys.stderr)

    def _summary(self, error: BaseException | None) -> dict[str, Any]:
        ended, reason = ("interrupted", self.interrupted.name) if self.interrupted else ("finished", "")
        if isinstance(error, KeyboardInterrupt):
            ended, reason = "interrupted", "at once, without saving"
        elif error is not None:
            ended, reason = "failed", " ".join(str(error).split()) or type(error).__name__
        devices = jax.devices()
        found = {
            "ended": ended,
            "reason": reason,
            "began_at": self._began_at,
            "ended_at": _now(),
            "parameters": self._parameters,
            "device": f"{len(devices)} x {machine.device(devices[0].device_kind)}",
            "processes": jax.process_count(),
            "command": None if "ipykernel" in sys.argv[0] else shlex.join(["python", *sys.argv]),
            "memory": self._memory(),
            "heldout": self._heldout(),
            "versions": machine.versions(),
        }
        # A start that had nothing left to do knows less than the one before.
        before = _before(self._workdir.summary) if ended == "finished" else {}
        return before | {name: value for name, value in found.items() if value is not None}

    def _memory(self) -> Mapping[str, int | None] | None:
        if self.memory is None:
            return None
        return {**dataclasses.asdict(self.memory), "predicted": self.memory.predicted}

    def _heldout(self) -> Mapping[str, float] | None:
        if self.heldout is None:
            return None
        bits = {"bits_per_byte": self.heldout.bits_per_byte(self._text_bytes)} if self._text_bytes else {}
        return {**self.heldout.scalars, **bits}


def _now() -> str:
    return datetime.fromtimestamp(time.time()).astimezone().isoformat(sep=" ", timespec="seconds")


def _before(path: Path) -> dict[str, Any]:
    """What the start before had left of this; nothing, if it cannot be read."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    kept = ("memory", "heldout")
    return {name: values[name] for name in kept if name in values} if isinstance(values, dict) else {}
