"""The house keeps its promises (docs/ARCHITECTURE.md): imports go down only, files stay small, nothing is dead."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
# From the ground up. A package may import those on lower floors and its neighbours on its own.
FLOORS = (
    ("ml.errors", "ml.config", "ml.machine", "ml.memory_maps", "pallas_kernels"),
    ("ml.weights",),
    ("ml.models",),
    ("ml.optim", "ml.data", "ml.checkpoint", "ml.parallel"),
    ("ml.train", "ml.serve"),
    ("ml.plan",),
    ("ml.studies",),
)
FILES = sorted(path for top in ("ml", "pallas_kernels") for path in (ROOT / top).rglob("*.py"))
MORE = sorted(path for top in ("scripts", "configs", "tests") for path in (ROOT / top).rglob("*.py"))
LONGEST = 500
# Longer files, each with the reason.
LONGER: dict[str, str] = {}


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


def test_no_import_goes_round_in_a_circle():
    modules = {module_of(path): path for path in FILES}
    graph = {module: imported_at_once(path, modules) - {module} for module, path in modules.items()}
    assert sum(map(len, graph.values())) > len(graph)
    graphlib.TopologicalSorter(graph).prepare()  # raises, and shows the circle


def imported_at_once(path, modules):
    """What a module imports when it is imported itself, among ours."""
    found = set()

    def look(statements):
        for node in statements:
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                found.update(name if name in modules else node.module for name in names)
            elif not isinstance(node, ast.FunctionDef | ast.ClassDef) and "TYPE_CHECKING" not in ast.dump(node):
                look(ast.iter_child_nodes(node))

    look(ast.parse(path.read_text()).body)
    return found & modules.keys()


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_public_names_are_documented(path):
    assert undocumented(ast.parse(path.read_text())) == []


def undocumented(tree):
    """Public names without a docstring; stubs of protocols, Flax's ``setup`` and what a base class documents aside."""
    missing = [] if ast.get_docstring(tree) or not tree.body else ["the module"]
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}

    def told_above(node, parent):
        names = {base.id for base in getattr(parent, "bases", ()) if isinstance(base, ast.Name)}
        return any(getattr(member, "name", "") == node.name for name in names & classes.keys()
                   for member in classes[name].body)  # fmt: skip

    def look(parent, prefix):
        for node in parent.body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            stub = ast.unparse(node.body[-1]) == "..."
            if not (ast.get_docstring(node) or stub or node.name == "setup" or told_above(node, parent)):
                missing.append(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                look(node, f"{prefix}{node.name}.")

    look(tree, "")
    return missing


def test_nothing_is_dead():
    """Vulture finds no code that only tests use, or nobody; exceptions stand in `tests/vulture_allowed.py`."""
    command = [sys.executable, "-m", "vulture"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_files_stay_small():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in (*FILES, *MORE)}
    assert {name: length for name, length in lengths.items() if length > LONGEST and name not in LONGER} == {}


def test_the_train_step_fits_on_a_screen_and_the_loop_in_150_lines():
    for name, function, limit in (("step", "make_train_step", 50), ("loop", "train", 150)):
        tree = ast.parse((ROOT / f"ml/train/{name}.py").read_text())
        (node,) = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == function]
        assert node.end_lineno - node.lineno < limit
