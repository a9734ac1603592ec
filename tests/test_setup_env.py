"""The set-up script's search for an interpreter and its up-to-date check, on fakes; nothing is installed."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOOLS = ("bash", "cat", "cksum", "tr", "awk", "sed", "dirname")


@pytest.fixture
def box(tmp_path):
    """A PATH with nothing on it but a few standard tools."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found, tool
        (tools / tool).symlink_to(found)
    return tmp_path


def put(path: pathlib.Path, version: str | None) -> str:
    """Writes a fake interpreter that says it is ``version``, or one that cannot run, and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if version is None:
        body = "echo 'pyenv: python: command not found' >&2; exit 127"
    else:
        body = f"printf '%s\\t%s\\n' {version} {path}"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def find(box, *bins, arguments=(), search="", **env):
    path = os.pathsep.join([*(str(box / name) for name in bins), str(box / "tools")])
    return subprocess.run(
        [shutil.which("bash") or "bash", str(ROOT / "scripts/setup_env.sh"), "--find", *arguments],
        env={"PATH": path, "HOME": str(box), "PYTHON_SEARCH": search, **env},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_broken_shim_first_on_the_path_is_passed_over(box):
    put(box / "shims/python3.13", None)
    put(box / "shims/python3", None)
    good = put(box / "usr/python3.12", "3.12.4")
    done = find(box, "shims", "usr")
    assert (done.returncode, done.stdout.strip()) == (0, good), done.stderr


def test_the_newest_that_works_is_chosen_wherever_it_lies(box):
    put(box / "a/python3.11", "3.11.9")
    put(box / "a/python3", "3.9.18")
    newest = put(box / "versions/3.12.10/bin/python3", "3.12.10")
    put(box / "versions/3.12.9/bin/python3", "3.12.9")
    done = find(box, "a", search=f"{box}/versions/*/bin")
    assert (done.returncode, done.stdout.strip()) == (0, newest), done.stderr


def test_a_version_without_tested_constraints_is_chosen_only_by_name(box):
    future = put(box / "a/python3", "3.19.0")
    tested = put(box / "a/python3.11", "3.11.2")
    assert find(box, "a").stdout.strip() == tested
    chosen = find(box, "a", PYTHON=future)
    assert chosen.stdout.strip() == future
    assert "3.19.0 is untested" in chosen.stderr


def test_prefer_takes_the_newest_of_that_minor_version(box):
    put(box / "a/python3.13", "3.13.1")
    put(box / "a/python3.11", "3.11.2")
    newer = put(box / "b/python3.11", "3.11.7")
    assert find(box, "a", "b", arguments=["--prefer", "3.11"]).stdout.strip() == newer


def test_none_that_works_is_one_clear_line(box):
    broken = put(box / "a/python3.12", None)
    old = put(box / "a/python3", "3.8.1")
    done = find(box, "a")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1
    for word in ("3.11", "PYTHON=", broken, f"{old} (3.8.1)"):
        assert word in done.stderr


@pytest.mark.parametrize("version", [None, "3.8.1"])
def test_an_explicit_python_that_will_not_do_is_refused(box, version):
    chosen = put(box / "a/mine", version)
    put(box / "a/python3.12", "3.12.4")
    done = find(box, "a", PYTHON=chosen)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert chosen in done.stderr


@pytest.fixture
def project(box):
    """A copy of what the set-up script reads, and an interpreter whose ``-m venv`` and ``-m pip`` only write a log."""
    root = box / "project"
    (root / "scripts").mkdir(parents=True)
    (root / "constraints").mkdir()
    for name in (
        "setup.cfg",
        "pyproject.toml",
        "scripts/setup_env.sh",
        "scripts/setup_env.py",
        "constraints/py312.txt",
    ):
        shutil.copy(ROOT / name, root / name)
    return root


FAKE_PYTHON = """#!/bin/sh
log={log}
case "$*" in
  *sysconfig*) printf '3.12.4\\t%s\\n' "$0" ;;
  *setup_env.py*) shift; exec {real} -c 'import runpy, sys; sys.executable = "'"$0"'"; sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")' "$@" ;;
  *"print(sys.version)"*) exec {real} "$@" ;;
  *"-m venv"*) echo venv >>$log; for last; do :; done; mkdir -p $last/bin; cp "$0" $last/bin/python ;;
  *"-m pip"*) echo pip >>$log; {pip} ;;
  *) exit 0 ;;
esac
"""


def set_up(project, pip="exit 0", **env):
    """Runs the set-up and returns (the finished process, the lines that venv and pip logged)."""
    log = project / "log"
    log.write_text("")
    python = project / "bin/python3.12"
    python.parent.mkdir(exist_ok=True)
    python.write_text(FAKE_PYTHON.format(log=log, real=sys.executable, pip=pip))
    python.chmod(0o755)
    done = subprocess.run(
        [shutil.which("bash") or "bash", "scripts/setup_env.sh"],
        cwd=project,
        env={"PATH": f"{python.parent}:{os.environ['PATH']}", "HOME": str(project), "PYTHON_SEARCH": "", **env}
        | {"PYTHON": str(python)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done, log.read_text().split()


def test_an_up_to_date_environment_is_left_alone_until_the_requirements_change(project):
    done, log = set_up(project)
    assert done.returncode == 0 and log == ["venv", "pip"], done.stderr
    assert set_up(project)[1] == []
    with open(project / "setup.cfg", "a") as file:
        file.write("# changed\n")
    assert set_up(project)[1] == ["pip"]
    assert set_up(project)[1] == []


def test_a_half_made_environment_is_made_again(project):
    set_up(project)
    (project / ".venv/.complete").unlink()
    (project / ".venv/leftover").touch()
    done, log = set_up(project)
    assert log == ["venv", "pip"], done.stderr
    assert not (project / ".venv/leftover").exists()


def test_an_environment_made_by_hand_is_never_deleted(project):
    (project / ".venv").mkdir()
    (project / ".venv/precious").touch()
    done, log = set_up(project)
    assert done.returncode == 1 and log == [] and "was not made by make" in done.stderr
    assert (project / ".venv/precious").exists()


@pytest.mark.parametrize(
    ("says", "tries", "hint"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", 1, "disk is full"),
        ("NewConnectionError: Failed to establish a new connection", 3, "index cannot be reached"),
        ("ERROR: No matching distribution found for flax", 1, "No matching distribution found for flax"),
    ],
)
def test_a_failed_install_says_why_in_one_line_and_is_not_taken_for_done(project, says, tries, hint):
    done, log = set_up(project, pip=f"echo '{says}'; exit 1")
    assert done.returncode == 1
    assert log == ["venv", *["pip"] * tries]
    assert hint in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert set_up(project)[1] == ["venv", "pip"]
