"""`scripts/reproduce.py`: a study through the script, and what it says of mistakes."""

import json

import jax
import matplotlib.image
import pytest
from script_processes import error_of, run

_FAKE = '''"""Fake: one is less than two."""

from ml.studies.outcome import Measured, Outcome, Panel, Series


def run(budget):
    sides = Measured("two", (2.0, 2.1, 2.2)), Measured("one", (1.0, 1.1, 1.2))
    panels = (Panel("seed", "value", (Series("one", (1.0, 2.0, 3.0), sides[1].values),)),)
    return Outcome("Numbers (1900)", "numbers", "One is less than two", "counted with " + budget, *sides, "units", "<",
                   True, (1, 2, 3), panels=panels)
'''
_FAILS = '''"""Fails: a claim that does not hold."""

from ml.studies.fake import Measured, Outcome


def run(budget):
    sides = Measured("two", (2.0,)), Measured("one", (1.0,))
    return Outcome("Lies (1901)", "numbers", "One is more", "counted", *sides, "units", ">", False, reason="it is less")
'''
_STOPPED = '''"""Stopped: by its user."""


def run(budget):
    raise KeyboardInterrupt
'''


@pytest.fixture
def reproduce(tmp_path):
    """Runs the script with three more studies, writing to ``tmp_path``."""
    folder = tmp_path / "more"
    folder.mkdir()
    for name, text in {"fake": _FAKE, "fails": _FAILS, "stopped": _STOPPED}.items():
        (folder / f"{name}.py").write_text(text)
    before = f"import ml.studies; ml.studies.__path__.append({str(folder)!r})"
    places = (f"--output={tmp_path / 'docs/results/studies'}", f"--papers={tmp_path / 'docs/papers.md'}")
    return lambda *arguments: run("reproduce.py", *arguments, *places, before=before)


def test_studies_write_json_and_plots_and_rebuild_the_table(tmp_path, reproduce):
    done = reproduce("--study=fake,fails")
    assert done.returncode == 0, done.stderr
    assert "fake: one 1.10 ± 0.10, two 2.10 ± 0.10 units (3 seeds)\nfake: holds\n" in done.stdout
    assert "fails: does not hold: it is less\n" in done.stdout
    results, papers = tmp_path / "docs/results/studies", tmp_path / "docs/papers.md"
    assert sorted(path.name for path in results.iterdir()) == ["fails.json", "fake.json", "fake.png"]
    assert matplotlib.image.imread(results / "fake.png").size
    record = json.loads((results / "fake.json").read_text())
    assert record["command"] == "python scripts/reproduce.py --study=fake --budget=cpu"
    assert record["versions"]["jax"] == jax.__version__ and "cores of" in record["device"]
    assert record["outcome"]["setup"] == "counted with cpu" and record["outcome"]["holds"] is True

    page = papers.read_text()
    assert page.index("| `fails` | Lies (1901) |") < page.index("| `fake` | Numbers (1900) |")
    assert "| **no**: it is less |" in page and "(results/studies/fake.png)" in page
    papers.write_text("old")
    assert reproduce("--table").returncode == 0
    assert papers.read_text() == page, "the same from the files alone"


def test_the_list_names_all_and_runs_none(tmp_path, reproduce):
    done = reproduce("--list")
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert lines["fake"] == "Fake: one is less than two." and "stopped" in lines and "lamb_batch_size" in lines
    assert not (tmp_path / "docs").exists()


def test_an_interrupt_leaves_nothing(tmp_path, reproduce):
    done = reproduce("--study=stopped")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (130, "interrupted")
    assert not (tmp_path / "docs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--study=fake,lamb_batchsize"],
            "--study=lamb_batchsize: there is no such study; did you mean 'lamb_batch_size'?",
        ),
        ([], "nothing to do: give one (--study=NAME, --all, --list or --table)"),
        (["--all", "--study=fake"], "--study and --all: give one of them"),
        (["--study=fake", "--budget=gpu"], "--budget=gpu: JAX finds no GPU here"),
    ],
)
def test_mistakes(tmp_path, reproduce, arguments, message):
    assert message in error_of(reproduce(*arguments))
    assert not (tmp_path / "docs").exists()
