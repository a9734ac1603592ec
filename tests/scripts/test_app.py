"""How every script starts and ends: one screen of help, one line for a mistake, the traceback of a real bug."""

import subprocess
import sys

import pytest
from script_processes import ROOT, error_of, run

_SCRIPT = """
import errno, sys
from absl import flags
from scripts import app
from ml.errors import UserError

if __name__ == "__main__":
    flags.DEFINE_string("what", "", "what happens")
    flags.DEFINE_integer("count", 1, "a number", lower_bound=1)


def main():
    what = flags.FLAGS.what
    if what == "user":
        raise UserError("--what=user: told\\n   in two lines; choose another")
    if what == "full":
        raise OSError(errno.ENOSPC, "No space left on device", "/some/file")
    if what == "quota":
        raise OSError(errno.EDQUOT, "Disk quota exceeded")
    if what == "permission":
        raise OSError(errno.EACCES, "Permission denied", "/some/file")
    if what == "bug":
        raise RuntimeError("a bug")
    if what == "interrupt":
        raise KeyboardInterrupt
    print("fine")


if __name__ == "__main__":
    app.run(main, usage="Does something.")
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("scripts") / "something.py"
    path.write_text(_SCRIPT)
    return lambda *arguments: run(path, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--what=user"], "error: --what=user: told in two lines; choose another"),
        (["--what=full"], "error: /some/file: disk full; free some space and run the same command again"),
        (["--what=quota"], "error: output: disk full; free some space and run the same command again"),
        (["--coutn=2"], "error: Unknown command line flag 'coutn'. Did you mean: count ? (see something.py --help)"),
        (["--count=many"], "error: flag --count=many: invalid literal for int() with base 10: 'many'"),
        (["--count=0"], "error: flag --count=0: "),
        (["stray"], "error: unexpected argument 'stray'; flags are written --name=value (see something.py --help)"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(script, arguments, message):
    assert error_of(script(*arguments)).startswith(message)


def test_success(script):
    done = script()
    assert (done.returncode, done.stdout, done.stderr) == (0, "fine\n", "")


@pytest.mark.parametrize(("what", "told"), [("bug", "RuntimeError: a bug"), ("permission", "Permission denied")])
def test_what_is_not_the_users_mistake_keeps_its_traceback(script, what, told):
    done = script(f"--what={what}")
    assert done.returncode not in (0, 2) and "Traceback" in done.stderr and told in done.stderr


def test_ctrl_c(script):
    done = script("--what=interrupt")
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize("name", ["train.py", "evaluate.py", "quickstart.py", "generate.py", "convert.py"])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_fits_a_screen_and_shows_an_example(name, flag):
    done = run(name, flag)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert 4 <= len(lines) <= 30
    assert any(line.startswith(f"  python scripts/{name} --") for line in lines)
    assert not any("absl" in line or "logtostderr" in line for line in lines)


def test_help_does_not_import_jax():
    command = [sys.executable, "-X", "importtime", "scripts/train.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=True)
    assert not any(line.split("|")[-1].strip() == "jax" for line in done.stderr.splitlines())
