"""The wheel: what is in it, and that it works where there is no checkout."""

import configparser
import json
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Imports every module of the wheel, and says where from; those that need an extra are in the test environment too.
IMPORT_ALL = """
import importlib, json, pkgutil, sys
sys.path.insert(0, sys.argv[1])
import ml, pallas_kernels
names = [m.name for p in (ml, pallas_kernels) for m in pkgutil.walk_packages(p.__path__, p.__name__ + ".")]
for name in names:
    importlib.import_module(name)
print(json.dumps({name: sys.modules[name].__file__ for name in names}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built without network: setuptools is in the test environment."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # setuptools leaves its traces beside the code
    for name in ("ml", "pallas_kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    done = subprocess.run(
        [*command, f"--wheel-dir={folder}", str(source)], capture_output=True, text=True, check=False, cwd=folder
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_it_holds_the_packages_and_their_data_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    code = {name for name in names if not name.startswith("megabatch-0.1.0.dist-info/")}
    expected = {
        str(path.relative_to(ROOT))
        for top in ("ml", "pallas_kernels")
        for path in (ROOT / top).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix in (".py", ".json", ".jinja", ".cc", ".h")
    }
    assert code == expected
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert wheel.name == f"megabatch-{setup['metadata']['version']}-py3-none-any.whl"


def test_all_of_it_is_imported_outside_of_the_repository(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    done = subprocess.run(
        [sys.executable, "-I", "-c", IMPORT_ALL, str(tmp_path / "site")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    files = json.loads(done.stdout.splitlines()[-1])
    assert len(files) > 200 and all(file.startswith(str(tmp_path)) for file in files.values())


def test_the_version_is_told_once_and_in_the_changelog():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert f"\n## [{setup['metadata']['version']}]" in (ROOT / "CHANGELOG.md").read_text()


def test_pip_finds_nothing_broken():
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
