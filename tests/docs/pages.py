"""The Markdown pages of the house: their code, links, tables and commands."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
PAGES = tuple(page for page in PAGES if "reference" not in page.parts)
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SHELL_ENDS = ("|", ">", "&&", ";", "#")


class Command(NamedTuple):
    """A command line in a page: the words after ``python`` or ``make``."""

    page: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"


def name_of(page: Path) -> str:
    """A page's path in the repository."""
    return str(page.relative_to(ROOT))


def fences(page: Path, language: str) -> list[str]:
    """The page's code blocks in a language."""
    return [code for found, code in _FENCE.findall(page.read_text()) if found == language]


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return _FENCE.sub("", page.read_text())


def commands(page: Path) -> list[Command]:
    """Every ``python scripts/...`` and ``make ...`` in the page's shell blocks and in its code spans."""
    lines = [line for code in fences(page, "sh") for line in re.sub(r"\\\n\s*", " ", code).splitlines()]
    lines += re.findall(r"`([^`\n]+)`", prose(page))
    found = []
    for line in lines:
        match = re.search(r"(?:^|[\s(])(?:python3? (scripts/\S+\.py.*)|(make [a-z][\w-]*.*))$", line)
        if match:
            found.append(Command(name_of(page), tuple(_words(match[1] or match[2]))))
    return found


def _words(line: str) -> list[str]:
    words = []
    for word in shlex.split(line, comments=True):
        if word in _SHELL_ENDS:
            break
        words.append(word)
    return words
