"""Links from a page to the rest of the repository: modules lead to the reference, other files to copies in the site.

So one link works on a code host, in an editor and in the site; one that leads nowhere is a warning, and so an error.
"""

import html
import os
import re
import shutil
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util import logging

_log = logging.getLogger(__name__)
_DOCS = Path(__file__).resolve().parents[1]
_ROOT = _DOCS.parent
_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the two halves: rewriting while reading, copying at the end."""
    app.connect("source-read", _rewrite)
    app.connect("build-finished", _copy)
    return {"parallel_read_safe": False}


def _rewrite(app: Sphinx, docname: str, content: list[str]) -> None:
    page = Path(app.env.doc2path(docname)).resolve()

    def replaced(match: re.Match[str]) -> str:
        path = match["path"]
        if "://" in path or path.startswith("mailto:"):
            return match[0]
        target = Path(os.path.normpath(page.parent / path))
        if target.is_relative_to(_DOCS) and target.suffix == ".md":
            return match[0]
        if not target.exists() or not target.is_relative_to(_ROOT):
            _log.warning("%s: the link to %s leads nowhere", docname, path, type="outside_links")
            return match[0]
        module = _module(target)
        if module is not None:
            return f"[{match['text']}](#{module})"
        relative = target.relative_to(_ROOT)
        _linked(app).add(relative)
        up = "../" * docname.count("/")
        address = f"{up}repository/{relative}" + ("/index.html" if target.is_dir() else "")
        return f'<a href="{html.escape(address)}">{match["text"]}</a>'

    if page.suffix == ".md":
        content[0] = _LINK.sub(replaced, content[0])


def _module(target: Path) -> str | None:
    """The dotted name of a module of ours, or of a package."""
    parts = target.relative_to(_ROOT).with_suffix("").parts
    if not parts or parts[0] not in ("ml", "pallas_kernels"):
        return None
    if target.is_dir() and not (target / "__init__.py").exists():
        return None
    return ".".join(parts).removesuffix(".__init__") if target.is_dir() or target.suffix == ".py" else None


def _linked(app: Sphinx) -> set[Path]:
    if not hasattr(app, "linked_outside"):
        app.linked_outside = set()  # type: ignore[attr-defined]
    return app.linked_outside  # type: ignore[attr-defined, no-any-return]


def _copy(app: Sphinx, error: Exception | None) -> None:
    if error is not None:
        return
    for relative in _linked(app):
        source, target = _ROOT / relative, Path(app.outdir) / "repository" / relative
        if source.is_dir():
            target.mkdir(parents=True, exist_ok=True)
            for file in sorted(path for path in source.iterdir() if path.is_file()):
                shutil.copyfile(file, target / file.name)
            names = sorted(path.name for path in source.iterdir() if path.is_file())
            entries = "".join(f'<li><a href="{html.escape(name)}">{html.escape(name)}</a></li>' for name in names)
            (target / "index.html").write_text(f"<title>{relative}</title><h1>{relative}</h1><ul>{entries}</ul>")
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
