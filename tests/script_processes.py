"""Runs the scripts as processes of their own, at a fraction of an interpreter's start: imports once, then forks.

As a program it reads one JSON request a line and answers each with one line. A forked child runs the script's file as
``__main__`` with the command line, the environment and the two output files that were asked for, and nothing else
differs from ``python scripts/NAME.py``; its process id is known, so that tests can send it signals.
"""

import atexit
import contextlib
import functools
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class Run:
    """A running or finished script."""

    def __init__(self, server: "_Server", pid: int, stdout: Path, stderr: Path):
        self._server, self.pid, self._stdout, self._stderr = server, pid, stdout, stderr
        self.returncode: int | None = None

    def wait(self) -> "Run":
        """Waits for the end."""
        if self.returncode is None:
            self.returncode = self._server.ask({"wait": self.pid})["returncode"]
        return self

    def kill(self, number: signal.Signals = signal.SIGKILL) -> "Run":
        """Sends a signal and waits for the end."""
        if not self.ended:
            os.kill(self.pid, number)
        return self.wait()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Waits until ``condition()`` or until the process has ended."""
        while not condition() and not self.ended:
            time.sleep(0.01)

    @property
    def ended(self) -> bool:
        return self._server.ask({"ended": self.pid})["ended"]

    @property
    def stdout(self) -> str:
        return _text(self._stdout)

    @property
    def stderr(self) -> str:
        return _text(self._stderr)


def _text(path: Path) -> str:
    """What was written so far: the process may not have got as far as to make the file."""
    return path.read_text() if path.exists() else ""


def start(script: str | os.PathLike[str], *arguments: object, before: str = "") -> Run:
    """Starts ``scripts/NAME ARGUMENTS``; ``before`` is Python that runs in its process first."""
    return _server().start([os.path.join("scripts", script), *map(str, arguments)], before)


def run(script: str | os.PathLike[str], *arguments: object, before: str = "") -> Run:
    """Starts and waits for the end."""
    return start(script, *arguments, before=before).wait()


def error_of(run: Run | subprocess.CompletedProcess[str]) -> str:
    """The one line that a script leaves for its user's mistake, wherever its log may have got to before."""
    lines = run.stderr.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert run.returncode == 2 and len(errors) == 1 and lines[-1] == errors[0], (run.returncode, run.stderr)
    assert "Traceback" not in run.stderr and not run.stdout, run.stderr
    return errors[0]


class _Server:
    """The process that imports and forks."""

    def __init__(self) -> None:
        self._folder, self._count = tempfile.TemporaryDirectory(), 0
        flags = os.environ.get("XLA_FLAGS", "").split()
        one_device = " ".join(flag for flag in flags if "device_count" not in flag)
        environment = os.environ | {"XLA_FLAGS": one_device}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        atexit.register(self._close)

    def start(self, argv: list[str], before: str) -> Run:
        self._count += 1
        stdout, stderr = (Path(self._folder.name, f"{self._count}.{name}") for name in ("stdout", "stderr"))
        answer = self.ask({"argv": argv, "stdout": str(stdout), "stderr": str(stderr), "before": before})
        return Run(self, answer["pid"], stdout, stderr)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def _close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._folder.cleanup()


@functools.cache
def _server() -> _Server:
    return _Server()


def _fork(request: dict[str, Any]) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        for number, name in ((1, "stdout"), (2, "stderr")):
            file = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        # Tests that run in the background may ignore it, as a shell wants; a script that is interrupted does not.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        exec(request["before"], {})
        sys.argv = request["argv"]
        sys.path.insert(0, str((ROOT / sys.argv[0]).parent))  # as Python does for a script
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    raise AssertionError


def _serve() -> None:
    import matplotlib.backends.backend_agg  # noqa: F401

    import ml.train.loop
    import ml.train.summary  # noqa: F401

    ended: dict[int, int] = {}
    running: set[int] = set()

    def reap(pid: int, options: int) -> bool:
        if pid in running:
            found, status = os.waitpid(pid, options)
            if found:
                ended[pid] = os.waitstatus_to_exitcode(status)
                running.discard(pid)
        return pid in ended

    for line in sys.stdin:
        request = json.loads(line)
        if "argv" in request:
            pid = _fork(request)
            running.add(pid)
            answer = {"pid": pid}
        elif "wait" in request:
            reap(request["wait"], 0)
            answer = {"returncode": ended[request["wait"]]}
        else:
            answer = {"ended": reap(request["ended"], os.WNOHANG)}
        print(json.dumps(answer), flush=True)
    for pid in running:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    _serve()
