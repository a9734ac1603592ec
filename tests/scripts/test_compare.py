"""`scripts/compare.py`: runs over one another, and paths that are wrong."""

import pytest
from run_folders import write_run
from script_processes import error_of, run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return write_run(folder / "lamb", ema=0.5), write_run(folder / "adamw", steps=30)


def test_runs_are_laid_over_one_another(runs, tmp_path):
    done = run("compare.py", *runs, f"--output={tmp_path / 'both.html'}")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-2:] == [str(tmp_path / "both.html"), str(tmp_path / "both.png")]
    told = {line.split()[0]: line.split()[1:] for line in lines if len(line.split()) == 3}
    assert told["train.steps"] == ["40", "30"] and told["train.ema"] == ["0.5", "-"]
    page = (tmp_path / "both.html").read_text()
    for title in ("Loss against tokens", "Loss against steps", "Loss against time", "Settings that differ"):
        assert title in page
    assert page.count("var(--orange)") > 3 and (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


def test_one_run_alone_gets_its_report_again(runs):
    done = run("compare.py", runs[0])
    assert done.returncode == 0 and (runs[0] / "report.html").is_file() and "1.2500" in done.stdout


def test_mistakes_are_one_line(runs, tmp_path):
    for arguments, message in (
        ([], "no runs are given"),
        ([runs[0], runs[0].parent / "adam"], "there is no such folder; runs in "),
        ([runs[0], runs[0]], "given twice"),
        ([*runs, "--output=x.png"], "--output=x.png: give it a name that ends in .html"),
        ([*runs, "--output=no/such/x.html"], "there is no such folder; make it first"),
    ):
        assert message in error_of(run("compare.py", *arguments))
