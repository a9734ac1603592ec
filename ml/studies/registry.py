"""Finds studies by listing the package: every module of `ml.studies` that defines ``run`` is one."""

import ast
import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path

import ml.studies
from ml.studies.outcome import Budget, Outcome


def studies() -> dict[str, str]:
    """Names in alphabetical order, each with the first line of the study's docstring; imports none of them."""
    found = {}
    for module in sorted(pkgutil.iter_modules(ml.studies.__path__), key=lambda module: module.name):
        path = _source(module)
        if path is None:
            continue
        tree = ast.parse(path.read_text())
        if any(isinstance(node, ast.FunctionDef) and node.name == "run" for node in tree.body):
            found[module.name] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def load(name: str) -> Callable[[Budget], Outcome]:
    """The ``run`` of a study, one of `studies`."""
    return importlib.import_module(f"ml.studies.{name}").run


def _source(module: pkgutil.ModuleInfo) -> Path | None:
    """The module's file, or its package's ``__init__.py``; ``None`` where it does not come as source."""
    spec = module.module_finder.find_spec(module.name, None)
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return None
    return Path(spec.origin)
