"""Signs of life between the processes of a run, independent of JAX: who dies or stalls is named on all others.

A star over TCP: each process tells process 0 about each second where it stands; process 0 keeps the `Roll`, sends a
sign of life of its own to all, and its verdict when there is one. The others notice by themselves when process 0 is
gone. On a verdict every process prints the same line and ends at once with the verdict's status, through ``os._exit``:
its main thread may be inside of a collective operation that will never end.
"""

import contextlib
import dataclasses
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax

from ml.errors import UserError
from ml.parallel.processes.connection import wait_for
from ml.parallel.processes.meeting import Meeting
from ml.parallel.processes.roll import HealthConfig, Phase, Report, Roll, Verdict

T = TypeVar("T")
_BEAT = 1.0
_POLL = 0.25
_FAREWELL = 2.0
# Errors of JAX that a process brings about alone; any other may be the echo of another process's death.
_OWN_FAULT = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED", "NOT_FOUND")


class Watch:
    """Where this process stands; of a single process no one asks."""

    def __init__(self) -> None:
        self.report = Report()

    def at(self, phase: Phase, step: int | None = None) -> None:
        """Notes that a phase begins; all processes must go through the same ones in the same order."""
        before = self.report
        self.report = Report(before.step if step is None else step, phase, before.position + 1)

    def over(self, batches: Iterable[T], phase: Phase) -> Iterator[T]:
        """Notes progress at each of ``batches``."""
        for batch in batches:
            self.at(phase)
            yield batch

    @contextlib.contextmanager
    def failures(self) -> Iterator[None]:
        """Tells the others of an error that leaves the context; one they may have caused waits for a verdict first."""
        try:
            yield
        except BaseException as error:
            self.failed(error)
            raise

    def failed(self, error: BaseException) -> None:
        """What `failures` does with an error."""

    def leave(self) -> None:
        """Says goodbye: the run is over for this process."""


class WatchedProcess(Watch):
    """One of several processes; a thread of its own exchanges signs of life and ends the process on a verdict."""

    def __init__(
        self,
        meeting: Meeting,
        process: int,
        config: HealthConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        end: Callable[[Verdict], None] | None = None,
    ):
        """Starts the thread.

        Args:
          meeting: who is there.
          process: the number of this one.
          config: when to give a process up.
          clock: returns seconds.
          end: called on a verdict; default: prints it and ends the process.
        """
        super().__init__()
        self._connections, self._process, self._config, self._clock = dict(meeting.connections), process, config, clock
        self._end = end or _end_process
        self._hub = process == 0
        judged = config
        if not self._hub:  # whether process 0 stalls is for process 0 to judge, which knows where all others stand
            judged = dataclasses.replace(config, stall_seconds=float("inf"), slow_seconds=float("inf"))
        self._roll = Roll(judged, meeting.identities, clock())
        self._lock = threading.RLock()  # of the roll and the connections
        self._over = threading.Event()
        self._failed = False
        self._leaving = False
        self._next_beat = 0.0
        threading.Thread(target=self._run, name="health", daemon=True).start()

    def failed(self, error: BaseException) -> None:
        if self._failed or self._leaving:
            return
        if _may_be_an_echo(error):
            self._over.wait(self._config.timeout_seconds + 2 * _FAREWELL)  # the verdict ends the process meanwhile
        status = 2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1
        text = " ".join(str(error).split()) or "interrupted"
        with self._lock:
            self._failed = True
            if self._hub:
                self._roll.failed(0, status, _named(error, text), self._clock())
            for connection in [] if self._hub else self._connections.values():
                connection.send(failed=_named(error, text), status=status, report=dataclasses.astuple(self.report))
        if self._hub:  # the others are told by this process's thread
            self._over.wait(2 * _FAREWELL + _BEAT)

    def leave(self) -> None:
        with self._lock:
            if self._failed:
                return
            self._leaving = True
            if self._hub:
                self._roll.done(0)
            for connection in [] if self._hub else self._connections.values():
                connection.send(bye=True)
        self._over.wait()

    def _run(self) -> None:
        while not self._over.is_set():
            wait_for(list(self._connections.values()), _POLL)
            self.attend()

    def attend(self) -> None:
        """One round: reads what came, judges, and sends a sign of life when it is time for one."""
        with self._lock:
            now = self._clock()
            for process, connection in list(self._connections.items()):
                for message in connection.receive():
                    self._take(process, message, now)
                if connection.closed:
                    self._roll.closed(process)
                    connection.close()
                    self._connections.pop(process, None)
            if self._hub:
                self._roll.heard(0, self.report, now)
            if self._over.is_set():
                return
            verdict = self._roll.verdict(now)
            if verdict is not None:
                self._conclude(verdict)
            elif self._leaving and (self._roll.all_done() if self._hub else not self._connections):
                self._over.set()
            elif now >= self._next_beat:
                self._next_beat = now + _BEAT
                for connection in self._connections.values():
                    connection.send(report=dataclasses.astuple(self.report))

    def _take(self, process: int, message: dict[str, Any], now: float) -> None:
        if "report" in message:
            self._roll.heard(process, Report(*message["report"]), now)
        if "failed" in message:
            self._roll.failed(process, message["status"], message["failed"], now)
        if "bye" in message:
            self._roll.done(process)
            if self._hub:
                self._connections[process].send(bye=True)
            elif self._leaving:
                self._connections[process].close()
        if "verdict" in message:
            self._conclude(Verdict(*message["verdict"]))

    def _conclude(self, verdict: Verdict) -> None:
        if self._hub:
            for connection in self._connections.values():
                connection.send(verdict=dataclasses.astuple(verdict))
            end = time.monotonic() + _FAREWELL
            for connection in self._connections.values():
                connection.finish(end - time.monotonic())
        self._connections.clear()
        self._over.set()
        if not self._failed:  # a process that failed itself tells its own story
            self._end(verdict)


def _named(error: BaseException, text: str) -> str:
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def _may_be_an_echo(error: BaseException | None) -> bool:
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if isinstance(error, jax.errors.JaxRuntimeError):
            return not str(error).startswith(_OWN_FAULT)
        seen.append(error)
        error = error.__cause__ or error.__context__
    return False


def _end_process(verdict: Verdict) -> None:
    # Written past Python's streams, whose locks the main thread may hold; a bar on a terminal had hidden the cursor.
    terminal = sys.stderr is not None and sys.stderr.isatty()
    text = f"\x1b[?25h\nerror: {verdict.line}\n" if terminal else f"error: {verdict.line}\n"
    with contextlib.suppress(OSError):
        os.write(2, text.encode())
    os._exit(verdict.status)
