"""Runs the scripts as processes of their own, at a fraction of an interpreter's start: imports once, then forks.

As a program it reads one JSON request a line and answers each with one line. A forked child runs the script's file as
``__main__`` with the command line, the environment and the two output files that were asked for, and nothing else
differs from ``python scripts/NAME.py``; its process id is known, so that tests can send it signals.
"""

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class Run:
    """A running or finished script."""

    def __init__(self, server: "Scripts", pid: int, stdout: Path, stderr: Path):
        self._server, self.pid, self._stdout, self._stderr = server, pid, stdout, stderr
        self.returncode: int | None = None

    def wait(self) -> "Run":
        """Waits for the end."""
        if self.returncode is None:
            self.returncode = self._server.ask({"wait": self.pid})["returncode"]
        return self

    def kill(self, number: signal.Signals = signal.SIGKILL) -> "Run":
        """Sends a signal and waits for the end."""
        os.kill(self.pid, number)
        return self.wait()

    def wait_until(self, condition) -> None:
        """Waits until ``condition()`` or until the process ends."""
        while not condition() and not self._server.ask({"ended": self.pid})["ended"]:
            time.sleep(0.01)

    @property
    def stdout(self) -> str:
        return self._stdout.read_text()

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()


class Scripts:
    """Starts scripts; a context manager."""

    def __init__(self, folder: Path):
        self._folder, self._count = folder, 0
        environment = os.environ | {"XLA_FLAGS": "", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, __file__]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        )

    def __enter__(self) -> "Scripts":
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def ask(self, request: dict) -> dict:
        """One request to the server."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, script: str, *arguments: object, before: str = "") -> Run:
        """Starts ``scripts/NAME.py ARGUMENTS``; ``before`` is Python that runs in its process first."""
        self._count += 1
        stdout, stderr = (self._folder / f"{self._count}.{name}" for name in ("stdout", "stderr"))
        argv = [f"scripts/{script}", *map(str, arguments)]
        answer = self.ask({"argv": argv, "stdout": str(stdout), "stderr": str(stderr), "before": before})
        return Run(self, answer["pid"], stdout, stderr)

    def run(self, script: str, *arguments: object, before: str = "") -> Run:
        """Starts and waits."""
        return self.start(script, *arguments, before=before).wait()


def _fork(request: dict) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        for number, name in ((1, "stdout"), (2, "stderr")):
            file = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        exec(request["before"], {})
        sys.argv = request["argv"]
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
    import ml.train.loop
    import ml.train.summary  # noqa: F401

    sys.path.insert(0, str(ROOT / "scripts"))  # as Python does for a script
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
