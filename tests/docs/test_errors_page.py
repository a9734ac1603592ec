"""The errors that docs/guides/errors.md explains are those that the code can say."""

import ast
import re

import pytest
from pages import ROOT, fences

MESSAGES = [line for code in fences(ROOT / "docs/guides/errors.md", "text") for line in code.splitlines() if line]
# As much of a message must be literal in the code.
LEAST = 15


def texts():
    """Each text in the code as its literal pieces, with anything between them."""
    found = []
    for folder in ("ml", "scripts", "pallas_kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    found.append([part.value for part in node.values if isinstance(part, ast.Constant)])
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(re.split(r"%[ds]", node.value))
    found += [[text] for text in re.findall(r'die "([^$"]*)', (ROOT / "scripts/setup_env.sh").read_text())]
    return [pieces for pieces in found if sum(map(len, pieces)) >= LEAST]


def says(pieces, message):
    """Whether the pieces follow one another in the message."""
    at = 0
    for piece in pieces:
        at = message.find(piece, at)
        if at < 0:
            return False
        at += len(piece)
    return True


@pytest.fixture(scope="module")
def said():
    return texts()


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_one_that_the_code_says(message, said):
    assert message.startswith(("error: ", "set-up: ", "note: "))
    assert any(says(pieces, message) for pieces in said), message
