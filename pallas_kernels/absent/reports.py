"""Compiles cases in a process of their own and hands back what the compilers say of them.

The compilers' switches are read when their plugins are loaded, and a compiler that aborts would take this process
along. One child compiles many cases; where one brings it down, the next child goes on behind it.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

# Long enough for the largest kernels on one slow core.
_SECONDS_PER_CASE = 600


def reports(family: str, cases: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Compiles cases for one device that need not be here.

    Args:
      family: key of `pallas_kernels.absent.TARGETS`.
      cases: names, as `pallas_kernels.cases.find` takes them.

    Returns:
      For each name either ``error``, or ``seconds`` (of compilation), ``memory`` (bytes of arguments, results and
      temporaries of the whole program) and ``kernels`` (`ptxas_report` or `llo_report`).
    """
    results: dict[str, dict[str, Any]] = {}
    while len(results) < len(cases):
        rest = [case for case in cases if case not in results]
        with tempfile.TemporaryDirectory() as folder:
            results |= _in_child(family, rest, pathlib.Path(folder))
    return results


def _in_child(family: str, cases: list[str], folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    from pallas_kernels.absent.llo import FLAGS

    dump, lines = folder / "dump", folder / "results"
    lines.touch()
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "0",
        "LIBTPU_INIT_ARGS": FLAGS.format(folder=dump),
        "MOSAIC_GPU_DUMP_TO": str(dump),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, "-m", "pallas_kernels.absent.child", family, str(dump), str(lines), *cases]
    log = folder / "log"
    reason = None
    with open(log, "w") as file:
        try:
            status = subprocess.run(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=_SECONDS_PER_CASE * len(cases),
                check=False,
            ).returncode
            reason = f"the compiler's process ended with status {status}"
        except subprocess.TimeoutExpired:
            reason = "the compiler did not end"
    results = dict(json.loads(line) for line in lines.read_text().splitlines())
    if len(results) < len(cases):
        last = " ".join(log.read_text(errors="replace").strip().splitlines()[-3:])[-500:]
        results[cases[len(results)]] = {"error": f"{reason}: {last}"}
    return results


def empty(folder: pathlib.Path) -> None:
    """Makes the folder, or what is in it go away."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
