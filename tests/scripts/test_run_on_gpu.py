"""`scripts/run_on_gpu.py`: its steps' order and budgets, and that one that fails costs no other."""

import importlib
import os
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def script(pytestconfig):
    """The script as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(pytestconfig.rootpath / "scripts")
        yield importlib.import_module("run_on_gpu")


def test_what_is_trusted_least_comes_first_and_all_of_it_fits_ten_minutes(script):
    steps = script.steps("out")
    assert [step.name for step in steps][:4] == ["hazard", "ceilings", "tests", "bench_paged"]
    assert sum(step.seconds for step in steps) < 600 - 5
    assert all("--output=out" in step.command for step in steps if step.name != "tests")


def test_every_kernel_is_measured(script):
    kernels = importlib.import_module("bench_kernels").KERNELS
    assert {f"bench_{kernel}" for kernel in kernels} <= {step.name for step in script.steps("out")}


def test_steps_that_fail_or_hang_are_told_and_the_rest_done(script, tmp_path, monkeypatch, capsys):
    steps = [
        script.Step("fails", ("-c", "print('a word'); raise SystemExit(3)"), 60),
        script.Step("hangs", ("-c", "import time; time.sleep(600)"), 1),
        script.Step("works", ("-c", "import os; print(os.environ['JAX_PLATFORMS'])"), 60),
    ]
    monkeypatch.setattr(script, "steps", lambda output: steps)
    monkeypatch.setattr(sys, "argv", ["run_on_gpu.py", f"--logs={tmp_path}", "--platform=cpu"])
    assert script.main() == 1
    out = capsys.readouterr().out
    assert "a word" in out and (tmp_path / "works.log").read_text() == "cpu\n"
    assert f"fails                failed with status 3; see {tmp_path / 'fails.log'}" in out
    assert "hangs                stopped after 1 s" in out and "works                passed" in out
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--only=works"])
    assert script.main() == 0


def test_it_needs_nothing_but_the_standard_library(pytestconfig):
    script = pytestconfig.rootpath / "scripts/run_on_gpu.py"
    environment = {"PATH": os.environ["PATH"]}
    command = [sys.executable, "-I", "-S", str(script), "--only=none"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--only=none: no such step" in done.stderr
