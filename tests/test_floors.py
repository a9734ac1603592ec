"""The house keeps its floors: imports only go down, and files stay small (docs/ARCHITECTURE.md)."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
# From the ground up. A package may import those on lower floors and its neighbours on its own.
FLOORS = (
    ("ml.errors", "ml.config", "pallas_kernels"),
    ("ml.weights",),
    ("ml.models",),
    ("ml.optim", "ml.data", "ml.checkpoint", "ml.parallel"),
    ("ml.train", "ml.serve"),
    ("ml.plan",),
    ("ml.studies",),
)
FILES = sorted(path for top in ("ml", "pallas_kernels") for path in (ROOT / top).rglob("*.py"))


def floor_of(module: str) -> int | None:
    for floor, packages in enumerate(FLOORS):
        if any(module == package or module.startswith(f"{package}.") for package in packages):
            return floor
    return None


def imported(path: pathlib.Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def module_of(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_go_down_only(path):
    here = floor_of(module_of(path))
    for name in imported(path):
        there = floor_of(name)
        assert here is None or there is None or there <= here, f"{module_of(path)} imports {name}, from a floor above"
        assert not (module_of(path).startswith("pallas_kernels") and name.split(".")[0] == "ml"), "the kernels know ml"


def test_every_package_has_a_floor():
    packages = {module_of(path.parent / "__init__.py") for path in FILES if path.parent != ROOT / "ml"}
    assert all(floor_of(package) is not None for package in packages)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_files_stay_small(path):
    assert len(path.read_text().splitlines()) <= 500


def test_the_train_step_fits_on_a_screen_and_the_loop_in_150_lines():
    for name, function, limit in (("step", "make_train_step", 50), ("loop", "train", 150)):
        tree = ast.parse((ROOT / f"ml/train/{name}.py").read_text())
        (node,) = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == function]
        assert node.end_lineno - node.lineno < limit
