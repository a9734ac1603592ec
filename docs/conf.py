"""The static site: guides in Markdown, and the API reference from docstrings. `make docs` builds it, strictly."""

import os
import sys
from importlib import metadata
from pathlib import Path

_HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(_HERE.parent), str(_HERE / "_extensions")]
# Modules are imported for their docstrings; nothing is computed.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

project = "Megabatch"
author = "The Megabatch authors"
copyright = author
version = release = metadata.version("megabatch")

extensions = [
    "myst_parser",
    "sphinx.ext.apidoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "outside_links",
]
exclude_patterns = ["reference/*/modules.rst", "results", "pictures"]

apidoc_modules = [
    {"path": str(_HERE.parent / name), "destination": f"reference/{name}", "separate_modules": False, "max_depth": 1}
    for name in ("ml", "pallas_kernels")
]
apidoc_module_first = True
# Each name where it is defined, not again where it is exported.
autodoc_default_options = {"members": True, "ignore-module-all": True, "member-order": "bysource"}
# A function with the name of a module beside it, which would be one address twice.
autodoc_default_options["exclude-members"] = "backend"
# A docstring's shapes and types are those of the signature, which stays short without them.
autodoc_typehints = "none"
default_role = "code"
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_attr_annotations = False

myst_heading_anchors = 3
nitpicky = False
suppress_warnings = ["ref.python"]  # a name that several modules export

html_theme = "furo"
html_title = "Megabatch"
html_static_path: list[str] = []
html_show_sourcelink = False
html_copy_source = False
