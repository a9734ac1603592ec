"""Executes the notebooks from top to bottom, each in a fresh process; fails at the first cell that does."""

import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import app
from absl import flags

_USAGE = """
Executes the notebooks at a small size, to see that every cell runs. With --save at full size, keeping what they show
(pictures and printed text, not the log).

  python scripts/notebooks.py
  python scripts/notebooks.py notebooks/01_train_at_large_batch.ipynb --save
"""
_ROOT = Path(__file__).resolve().parents[1]
_KEPT_KINDS = ("stream", "display_data", "execute_result")

if __name__ == "__main__":
    flags.DEFINE_boolean("save", False, "at full size, and write the outputs into the files")
    flags.DEFINE_integer("cell_seconds", 600, "most seconds that one cell may take", lower_bound=1)


def main(paths: list[str]) -> None:
    """Reads the flags, executes, reports."""
    logging.getLogger("traitlets").setLevel(logging.WARNING)
    import nbformat
    from nbclient.exceptions import CellExecutionError, CellTimeoutError

    from ml.errors import UserError

    found = [Path(path) for path in paths] or sorted((_ROOT / "notebooks").glob("*.ipynb"))
    for path in found:
        if not path.is_file():
            raise UserError(f"{path}: there is no such notebook")
    for path in found:
        start = time.monotonic()
        notebook: Any = nbformat.read(path, as_version=4)
        try:
            execute(notebook, small=not flags.FLAGS.save, cell_seconds=flags.FLAGS.cell_seconds)
        except (CellExecutionError, CellTimeoutError) as error:
            print(f"{path.name}: failed\n{error}", file=sys.stderr)
            sys.exit(1)
        if flags.FLAGS.save:
            nbformat.write(cleaned(notebook), path)
        print(f"{path.name}: {time.monotonic() - start:.0f} s", flush=True)


def execute(notebook: Any, *, small: bool, cell_seconds: int) -> None:
    """Runs all cells, in place.

    Args:
      notebook: of nbformat.
      small: see the notebooks' first cell.
      cell_seconds: for each cell.

    Raises:
      nbclient.exceptions.CellExecutionError, CellTimeoutError: a cell failed or took too long.
    """
    import nbclient

    # Each notebook makes its files below its folder: here that is one that goes away.
    with tempfile.TemporaryDirectory(prefix="notebook_") as folder:
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")]))
        # A process of its own, which must not inherit how many devices a test emulates.
        size = "small" if small else ""
        environment = os.environ | {"PYTHONPATH": path, "NOTEBOOK_SIZE": size, "XLA_FLAGS": _flags()}
        client = nbclient.NotebookClient(
            notebook, timeout=cell_seconds, kernel_name="python3", resources={"metadata": {"path": folder}}
        )
        client.extra_arguments = ["--IPKernelApp.log_level=40"]
        client.execute(env=environment)


def cleaned(notebook: Any) -> Any:
    """Keeps what a reader looks at: no log, no times, no output of cells tagged ``not-kept``."""
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.metadata.pop("execution", None)
        kinds = () if "not-kept" in cell.metadata.get("tags", []) else _KEPT_KINDS
        cell.outputs = [o for o in cell.outputs if o.output_type in kinds and o.get("name") != "stderr"]
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}  # not this machine's version
    return notebook


def _flags() -> str:
    return " ".join(flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag)


if __name__ == "__main__":
    app.run(main, usage=_USAGE, takes_words=True)
