"""The roll of a run's processes: who was last heard when, and where; and the verdict on one that died or stalled.

All processes go through the same phases in the same order, so a phase's number in that order, its *position*, can be
compared between processes: when nothing moves, those with the smallest position are what the others wait for (the hang
finder of MegaScale, Jiang et al. 2024, section 4: the rank that did not log the operation is the suspect).

Pure bookkeeping: no thread, no socket, no clock.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from ml.errors import UserError

# Exit status of a process that ends because another one died or stalled: start the job again (sysexits' EX_TEMPFAIL).
RESTART_STATUS = 75
RESTART = "restart the job: it goes on from the newest whole checkpoint"

Phase = Literal[
    "starting", "preparing data", "restoring", "compiling", "data", "step", "evaluating", "saving", "ending"
]
_SLOW = ("starting", "restoring", "compiling", "evaluating", "saving", "ending")
# Processes that fail for the same reason at the same time each tell it themselves within this many seconds.
_FAILURE_GRACE = 2.0


@dataclasses.dataclass(frozen=True)
class HealthConfig:
    """How long processes wait for one another; of no effect with a single process.

    Attributes:
      start_seconds: for all processes to come at the start.
      timeout_seconds: without a sign of life, after which a process counts as dead. One whose connection is closed does
        so at once.
      stall_seconds: a process that lives may spend on one step or one batch of data.
      slow_seconds: the same for compiling, restoring, saving and evaluating; preparing data may last for ever.
    """

    start_seconds: float = 300.0
    timeout_seconds: float = 60.0
    stall_seconds: float = 600.0
    slow_seconds: float = 3600.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) <= 0:
                raise ValueError(f"{field.name}={getattr(self, field.name)} must be positive")
        if self.slow_seconds < self.stall_seconds:
            raise UserError(
                f"config.health.slow_seconds={self.slow_seconds:g} is shorter than stall_seconds="
                f"{self.stall_seconds:g}; make it at least as long"
            )

    def limit(self, phase: str) -> float:
        """Seconds that a process may spend in a phase."""
        if phase == "preparing data":
            return float("inf")
        return self.slow_seconds if phase in _SLOW else self.stall_seconds


@dataclasses.dataclass(frozen=True)
class Identity:
    """Which process, on which machine."""

    process: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"process {self.process} (host {self.host}, pid {self.pid})"


@dataclasses.dataclass(frozen=True)
class Report:
    """Where a process stands.

    Attributes:
      step: the step it works on; 0 before the first.
      phase: what it does there.
      position: number of phases that it has begun.
    """

    step: int = 0
    phase: str = "starting"
    position: int = 0


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Why the run ends: one line for the user, and the exit status of every process."""

    line: str
    status: int = RESTART_STATUS


@dataclasses.dataclass
class _Entry:
    identity: Identity
    heard: float
    moved: float
    report: Report = Report()
    state: Literal["here", "closed", "failed", "done"] = "here"
    failure: tuple[float, int, str] = (0.0, 0, "")


class Roll:
    """What is known of each process; times are seconds of any one clock."""

    def __init__(self, config: HealthConfig, identities: Sequence[Identity], now: float):
        self._config = config
        self._entries = {identity.process: _Entry(identity, now, now) for identity in identities}

    def heard(self, process: int, report: Report, now: float) -> None:
        """A sign of life."""
        entry = self._entries[process]
        if report.position != entry.report.position:
            entry.moved = now
        entry.heard, entry.report = now, report

    def closed(self, process: int) -> None:
        """Its connection was closed: unless it had said goodbye, it died."""
        entry = self._entries[process]
        if entry.state == "here":
            entry.state = "closed"

    def done(self, process: int) -> None:
        """It said goodbye: it has nothing more to do, and no one waits for it."""
        self._entries[process].state = "done"

    def failed(self, process: int, status: int, message: str, now: float) -> None:
        """It said that it ends with an error."""
        entry = self._entries[process]
        if entry.state == "here":
            entry.state, entry.failure = "failed", (now, status, message)

    def all_done(self) -> bool:
        """Whether every process said goodbye."""
        return all(entry.state == "done" for entry in self._entries.values())

    def verdict(self, now: float) -> Verdict | None:
        """The reason to end the run, if there is one."""
        for entry in self._entries.values():
            if entry.state == "failed" and now - entry.failure[0] >= _FAILURE_GRACE:
                _, status, message = entry.failure
                return Verdict(f"{entry.identity} failed {_place(entry.report)}: {message}", status)
        for entry in self._entries.values():
            if entry.state == "closed":
                return _lost(entry, "died", now)
        here = [entry for entry in self._entries.values() if entry.state == "here"]
        for entry in here:
            if now - entry.heard > self._config.timeout_seconds:
                return _lost(entry, "does not answer: it died or hangs", now)
        return self._stalled(here, now)

    def _stalled(self, here: list[_Entry], now: float) -> Verdict | None:
        if not here:
            return None
        last = min(entry.report.position for entry in here)
        behind = [entry for entry in here if entry.report.position == last]
        # The clock of a wait starts when the last of them came to where they stand.
        since = now - max(entry.moved for entry in behind)
        if since <= self._config.limit(behind[0].report.phase):
            return None
        if len(behind) == len(self._entries) > 1:
            place = _place(behind[0].report, f"for {since:.0f} s")
            return Verdict(f"every process hangs {place}: a device, or the network between them; {RESTART}")
        more = f", and with it {len(behind) - 1} more," if len(behind) > 1 else ""
        place = _place(behind[0].report, f"for {since:.0f} s", now - behind[0].heard)
        return Verdict(f"{behind[0].identity}{more} stalled {place} while the others wait for it; {RESTART}")


def _lost(entry: _Entry, how: str, now: float) -> Verdict:
    return Verdict(f"{entry.identity} {how} {_place(entry.report, heard=now - entry.heard)}; {RESTART}")


def _place(report: Report, more: str = "", heard: float | None = None) -> str:
    parts = [f"phase {report.phase}", more, "" if heard is None else f"last heard {heard:.0f} s ago"]
    return f"at step {report.step} ({', '.join(filter(None, parts))})"
