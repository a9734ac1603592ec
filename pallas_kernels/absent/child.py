"""The process that compiles cases: ``python -m pallas_kernels.absent.child FAMILY DUMP RESULTS CASE...``.

Writes one line of JSON for each case as soon as it is done.
"""

import json
import pathlib
import sys
import time
from typing import Any

from pallas_kernels.absent import TARGETS, compile_for
from pallas_kernels.absent.llo import llo_report
from pallas_kernels.absent.ptxas import ptxas_report
from pallas_kernels.absent.reports import empty
from pallas_kernels.cases import Case, find


def report(family: str, case: Case, dump: pathlib.Path) -> dict[str, Any]:
    """Compiles one case; what the compiler writes about it goes to the folder ``dump`` and away again."""
    empty(dump)
    begin = time.monotonic()
    compiled = compile_for(family, case.function, *case.arguments)
    seconds = time.monotonic() - begin
    read = llo_report if TARGETS[family].platform == "tpu" else ptxas_report
    kernels = read(dump)
    empty(dump)
    memory = compiled.memory_analysis()
    sizes = {name: int(getattr(memory, f"{name}_size_in_bytes", 0)) for name in ("argument", "output", "temp", "alias")}
    return {"seconds": round(seconds, 1), "memory": sizes, "kernels": kernels}


def main(family: str, dump: str, results: str, *names: str) -> None:
    """Compiles the cases in order."""
    for name in names:
        try:
            result = report(family, find(name), pathlib.Path(dump))
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:2000]}"}
        with open(results, "a") as file:
            file.write(json.dumps([name, result]) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
