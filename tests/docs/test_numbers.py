"""No number without its source: what a page shows as a result is computed from committed JSON or from data sheets.

Above a table or a paragraph with results stands a comment that says what each number is::

    <!-- numbers
    75% = r("preflight_llama3_8b_v5e_16x16").roofline.mfu
    1.11 = r("bench_train").results["4m"].speed_ratio
    -->

where ``r`` reads a file of ``docs/results`` and ``chip`` is a data sheet's entry; see the functions below. Each is
computed, rounded as it is shown, and looked for in what follows; and what looks like a result and is in no such comment
is found too.
"""

import json
import re
import statistics
from types import SimpleNamespace

import pytest
from pages import PAGES, ROOT, name_of

from ml.plan.topology import FAMILIES

COMMENT = re.compile(r"<!-- numbers\n(.*?)-->\n+", re.DOTALL)
# A number with a unit in which results are told; or with two decimals, as ratios are.
UNITS = r"(?:GiB|MiB|GB\b|tokens/s|requests/s|ms\b|times (?:as|faster)|TFLOP)"
RESULT = re.compile(rf"(?<![\w.`/-])(?:(\d[\d,]*(?:\.\d+)?)(?=\s*{UNITS})|(\d[\d,]*(?:\.\d+)?%))")
CELL = re.compile(r"~?\d[\d,]*\.\d+%?|\d[\d,]*%")


class _Node(SimpleNamespace):
    """A JSON object with its keys as attributes and as items."""

    def __getitem__(self, key):
        return getattr(self, key)


def r(name):
    """A file of docs/results, by its path without ``.json``."""
    return json.loads((ROOT / f"docs/results/{name}.json").read_text(), object_hook=lambda d: _Node(**d))


def chip(family):
    """The data sheet of a family's chip."""
    return FAMILIES[family].chip


def cases(name):
    """The cases of a benchmark's file, by their names."""
    return {case.name: case for case in r(name).cases}


def blocks(text):
    """Paragraphs and tables of a page outside of code, each with the numbers that its comment accounts for."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    pieces = COMMENT.split(text)  # text, comment, text, comment, text...
    found = [(block, {}) for block in pieces[0].split("\n\n")]
    for comment, after in zip(pieces[1::2], pieces[2::2], strict=True):
        first, *others = after.split("\n\n")
        entries = [line.split(" = ", 1) for line in comment.strip().splitlines()]
        found += [(first, entries), *((block, {}) for block in others)]
    return [(re.sub(r"`[^`\n]*`", "``", block), entries) for block, entries in found]


def shown(value, like):
    """A value, rounded and written as ``like`` is."""
    digits = re.match(r"[\d,]+(?:\.(\d+))?", like)
    decimals = len(digits[1] or "")
    suffix = like[digits.end() :]
    number = f"{value * (100 if suffix == '%' else 1):,.{decimals}f}"
    return (number if "," in like or "," not in number else number.replace(",", "")) + suffix


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_results_have_sources(page):
    for block, entries in blocks(page.read_text()):
        accounted = [number for number, _ in entries]
        for number, expression in entries:
            value = eval(expression, {"r": r, "chip": chip, "cases": cases, "mean": statistics.fmean})
            assert shown(value, number) == number, f"{expression} is {value}, and the page says {number}"
            assert number in block, f"{number} is not in what follows its comment"
        if page.name == "papers.md":  # made from the JSON; tests/test_results.py compares all of it
            continue
        if block.lstrip().startswith("|"):
            cells = [cell.strip() for line in block.strip().splitlines() for cell in line.strip("|").split("|")]
            results = [cell for cell in cells if CELL.fullmatch(cell)]
        else:
            results = [first or second for first, second in RESULT.findall(block)]
        for result in results:
            assert result in accounted, f"{result} has no source: {' '.join(block.split())[:200]}"


def test_it_finds_what_it_looks_for():
    fine = "Twice as fast.\n\n<!-- numbers\n50% = 1 / 2\n1.50 = 3 / 2\n-->\n\n| a | 50% |\n|---|---|\n| b | 1.50 |\n"
    assert [entries for _, entries in blocks(fine) if entries] == [[["50%", "1 / 2"], ["1.50", "3 / 2"]]]
    assert shown(1234.56, "1,235") == "1,235" and shown(0.756, "76%") == "76%" and shown(98.3, "98 thousand")
    for text in ("It is 3.2 GiB.", "about 40% of it", "12 tokens/s", "1,200 ms"):
        assert RESULT.search(text), text
    for text in ("Python 3.11, TPU v5e", "a batch of 4,096 tokens", "8 devices"):
        assert not RESULT.search(text), text
