"""Finds the fastest configuration of a kernel at each shape by trying, and keeps it in the tuning table."""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import app
from absl import flags

_USAGE = """
Tries configurations of a kernel on this machine's device, at one shape after the other, and writes the best to the
table that the kernel goes by (pallas_kernels/tuning/OP.json). A candidate that crashes or hangs costs only itself.

  python scripts/tune_kernels.py --kernel=paged_attention
  python scripts/tune_kernels.py --kernel=flash_attention --output=tables --budget=600
"""

_ROOT = Path(__file__).resolve().parents[1]


def define_flags() -> None:
    """Defines the script's flags."""
    flags.DEFINE_string("kernel", None, "the table's name, such as paged_attention")
    flags.DEFINE_string("output", "pallas_kernels/tuning", "folder of the tables")
    flags.DEFINE_float("timeout", 60, "seconds that one candidate may take, compilation included")
    flags.DEFINE_float("budget", None, "seconds after which no further shape is begun")
    flags.DEFINE_integer("rounds", 5, "turns of each candidate, of which the median counts", lower_bound=1)


def main() -> None:
    """Tunes shape after shape, writing the table after each."""
    from ml.errors import UserError

    args = flags.FLAGS
    begin = time.monotonic()
    with Worker() as worker:
        device = worker.ask({"describe": args.kernel}, 120)
    if "error" in device:
        raise UserError(f"--kernel={args.kernel}: {device['error']}")
    if not device["spaces"]:
        valid = ", ".join(device["ops"]) or "none on this platform"
        raise UserError(f"--kernel={args.kernel}: nothing to tune on {device['chip']}; there is: {valid}")
    from pallas_kernels.tuning import Entry, merged, read, write

    path = Path(args.output) / f"{args.kernel}.json"
    for index, space in enumerate(device["spaces"]):
        if args.budget is not None and time.monotonic() - begin > args.budget:
            print(f"not tuned for want of time: {len(device['spaces']) - index} of {len(device['spaces'])} shapes")
            break
        times = tune(args.kernel, index, space["candidates"], args.timeout, args.rounds)
        measured = [(seconds, config) for seconds, config in times if seconds is not None]
        shape = ", ".join(f"{name} {size}" for name, size in space["shape"].items())
        if not measured:
            print(f"{shape}: no candidate worked", flush=True)
            continue
        seconds, config = min(measured, key=lambda pair: pair[0])
        print(f"{shape}: {json.dumps(config)} {seconds * 1e3:.4f} ms, of {len(measured)} that worked", flush=True)
        entry = Entry(args.kernel, device["chip"], space["dtype"], space["shape"], config, seconds, device["versions"])
        write(path, args.kernel, merged(read(path) if path.exists() else (), [entry]))
    print(f"table: {path}")


def tune(op: str, index: int, candidates: Iterable[Mapping[str, Any]], timeout: float, rounds: int) -> list:
    """Seconds (``None``: it failed) and configuration of each candidate, tried one after the other in a process."""
    results: list = []
    worker = Worker()
    try:
        for config in candidates:
            answer = worker.ask({"op": op, "space": index, "config": dict(config), "rounds": rounds}, timeout)
            if worker.ended:
                worker.close()
                worker = Worker()
            if "error" in answer:
                print(f"  {json.dumps(dict(config))}: {answer['error'][:200]}", flush=True)
            results.append((answer.get("seconds"), dict(config)))
    finally:
        worker.close()
    return results


class Worker:
    """The process that compiles and measures: one line of JSON to it, one back."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(_ROOT), *sys.path]))}
        command = [sys.executable, str(Path(__file__).resolve()), "--worker"]
        # Answers have a channel of their own, since compilers write to standard output.
        read, write = os.pipe()
        self._process = subprocess.Popen(
            [*command, str(write)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment, pass_fds=[write]
        )
        os.close(write)
        self._answers = os.fdopen(read)
        self.ended = False

    def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        """The answer, or an ``error`` if there is none in time or the process ends."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write((json.dumps(request) + "\n").encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            self.ended = True
            return {"error": "the process had ended"}
        if not select.select([self._answers], [], [], timeout)[0]:
            self.ended = True
            return {"error": f"no result in {timeout:.0f} s"}
        line = self._answers.readline()
        if not line:
            self.ended = True
            return {"error": f"the process ended with status {self._process.wait()}"}
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        self._answers.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def work(channel: int) -> None:
    """The body of the worker's process."""
    answers = os.fdopen(channel, "w", buffering=1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = _describe(request["describe"]) if "describe" in request else _measure(**request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
        answers.write(json.dumps(answer) + "\n")


def _spaces(op: str | None = None) -> list:
    from pallas_kernels.platform import platform
    from pallas_kernels.tuning.space import all_spaces

    return [space for space in all_spaces(platform()) if op is None or space.op == op]


def _describe(op: str | None) -> dict[str, Any]:
    from machine import versions

    from pallas_kernels.platform import chip

    spaces = [
        {"dtype": s.dtype, "shape": dict(s.shape), "candidates": [dict(c) for c in s.candidates]} for s in _spaces(op)
    ]
    ops = sorted({space.op for space in _spaces()})
    return {"chip": chip(), "versions": versions(), "spaces": spaces if op else [], "ops": ops}


def _measure(op: str, space: int, config: dict[str, Any], rounds: int) -> dict[str, float]:
    from kernel_bench.timing import TURN_SECONDS, Program, Timer, interleaved

    from pallas_kernels.platform import platform

    function, sets = _spaces(op)[space].make(config)
    timer = Timer(Program("candidate", function, sets), TURN_SECONDS[platform()])
    return {"seconds": interleaved([timer], rounds)["candidate"]["seconds"]}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(int(sys.argv[2]))
    else:
        define_flags()
        app.run(main, usage=_USAGE)
