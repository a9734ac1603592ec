"""The notebooks as they are committed: executed once from top to bottom, or not at all; nothing of the machine.

That every cell runs is what `make notebooks` finds out.
"""

import json
from pathlib import Path

import pytest
from script_processes import ROOT, error_of, run

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_was_executed_whole(path: Path):
    text = path.read_text()
    cells = json.loads(text)["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    counts = [cell["execution_count"] for cell in code]
    assert counts in ([None] * len(code), list(range(1, len(code) + 1))), "run: make notebooks ARGS=--save"
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs)
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    assert bool(counts[0]) == bool(outputs) and (not outputs or pictures >= 1), "pictures are what people look at"
    assert len(text) < 1_000_000 and "/home/" not in text and str(ROOT) not in text
    setup = "".join(code[0]["source"])
    assert "google.colab" in setup and "NOTEBOOK_SIZE" in setup


def test_there_are_four():
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04"]


def test_a_wrong_name_is_one_line():
    assert "no.ipynb: there is no such notebook" in error_of(run("notebooks.py", "no.ipynb"))
