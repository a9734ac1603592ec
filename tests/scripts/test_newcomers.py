"""The mistakes of the first minutes: each ends in one sentence that helps.

Wrong paths: test_bad_input.py and test_config_flag.py; full disks: test_bad_input.py; ports:
tests/serve/api/test_shutdown.py; Pythons, disks and networks of the set-up: tests/test_setup_env.py.
"""

import ast
import os
import subprocess
import sys

import pytest
from script_processes import ROOT, error_of, run

_HIDE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
for name in [name for name in sys.modules if name.partition(".")[0] in {names!r}]:
    del sys.modules[name]
"""
_COMPUTES = f"""
import sys
sys.path.insert(0, {str(ROOT / "scripts")!r})
import app

def main():
    import jax
    print(jax.default_backend())

if __name__ == "__main__":
    app.run(main, usage="Computes.")
"""


def hide(*names):
    return _HIDE.format(names=names)


@pytest.fixture
def computes(tmp_path):
    path = tmp_path / "computes.py"
    path.write_text(_COMPUTES)
    return path


def test_an_environment_that_is_not_active():
    """Not even the flags' package is there, and the script's first import says what to do."""
    for name in ("absl", "ml"):
        done = run("train.py", "--help", before=hide(name))
        message = f"error: {name} is not installed for {sys.executable}: `make env`, then . .venv/bin/activate\n"
        assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


def test_a_python_that_is_too_old():
    done = run("generate.py", before="import sys; sys.version_info = (3, 9, 2, 'final', 0)")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "this is Python 3.9" in done.stderr and "3.11 or newer is needed" in done.stderr


def test_every_script_asks_first():
    """`app` is imported before anything that an old Python, or one without our packages, stumbles over."""
    for path in [*(ROOT / "scripts").glob("*.py"), *(ROOT / "scripts/launch").glob("*.py")]:
        tree = ast.parse(path.read_text())
        imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = [node.names[0].name if isinstance(node, ast.Import) else node.module for node in imports]
        if "app" not in names:
            continue
        before = {name.partition(".")[0] for name in names[: names.index("app")]}
        assert before <= sys.stdlib_module_names, f"{path.name} imports {before} before app"
        ast.parse(path.read_text(), feature_version=(3, 9))


def test_an_extra_that_is_missing(tmp_path):
    done = run("serve.py", f"--model={tmp_path}", before=hide("fastapi", "uvicorn"))
    assert "is not installed for" in error_of(done) and error_of(done).endswith("pip install -e '.[serve]'")


def test_extras_are_those_of_the_setup():
    setup = (ROOT / "setup.cfg").read_text()
    sys.path.insert(0, str(ROOT / "scripts"))
    import app

    for package, extra in app._EXTRAS.items():
        group = setup.partition(f"\n{extra} =\n")[2].partition(" =\n")[0]
        assert package.replace("_", "-") in group.replace("_", "-"), f"{package} is not in {extra}"


def test_a_gpu_without_its_plugin_is_told_of(computes):
    """JAX notices the device; what it says goes by way of our one sentence. Nothing else is on standard error."""
    before = "import os; os.environ.pop('JAX_PLATFORMS', None)\n"
    before += "from jax._src import hardware_utils, config\n"
    before += "hardware_utils.has_visible_nvidia_gpu = lambda: True\n"
    before += "import jax; jax.config.update('jax_platforms', None)\n" + hide("libtpu", "jax_plugins")
    done = run(computes, before=before)
    assert (done.returncode, done.stdout) == (0, "cpu\n"), done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("note: the NVIDIA GPU that seems to be here is not used") and "'.[cuda13]'" in line


def test_a_gpu_that_is_asked_for_and_cannot_be_had(computes):
    done = subprocess.run(
        [sys.executable, str(computes)],
        env=os.environ | {"JAX_PLATFORMS": "cuda", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    message = error_of(done)
    assert message.startswith("error: JAX_PLATFORMS=cuda: ") and "pip install -e '.[cuda13]'" in message
    assert len(done.stderr.splitlines()) == 1
