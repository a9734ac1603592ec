"""The prose in Python source: docstrings and comments; and prose cut into sentences."""

import ast
import inspect
import io
import re
import tokenize
from collections.abc import Iterator

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_PARAGRAPHS = re.compile(r"\n\s*\n")
# After a full stop, with whatever closes behind it, before what can begin a sentence.
_SENTENCES = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]["')\]]))\s+(?=["'(\[`A-Z0-9])""")
# Two letters or more: rules of dashes, commented-out punctuation and the like are no prose.
_WORDS = re.compile(r"[^\W\d_]{2}")


def prose(source: str) -> Iterator[str]:
    """Yields the docstrings and the blocks of comments of a module, in the order of their lines.

    Args:
      source: Python source.

    Raises:
      SyntaxError: it is not Python, or of another version (`tokenize.TokenError` becomes one).
    """
    blocks = [*_documented(source), *_comments(source)]
    for _, text in sorted(blocks, key=lambda block: block[0]):
        if _WORDS.search(text):
            yield text


def sentences(text: str) -> list[str]:
    """Cuts text at blank lines and behind full stops; white space within a sentence becomes single spaces.

    An abbreviation before a capital ends a sentence too: a rule that knows no language is wrong now and then.
    """
    found = []
    for paragraph in _PARAGRAPHS.split(text):
        for sentence in _SENTENCES.split(paragraph):
            words = " ".join(sentence.split())
            if words:
                found.append(words)
    return found


def docstrings(source: str) -> Iterator[str]:
    """Yields the docstrings of a module, in the order of their lines; errors as `prose`'s."""
    for _, text in sorted(_documented(source), key=lambda block: block[0]):
        if _WORDS.search(text):
            yield text


def _documented(source: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, _DOCUMENTED) and node.body and (text := ast.get_docstring(node, clean=False)):
            yield node.body[0].lineno, inspect.cleandoc(text)


def _comments(source: str) -> Iterator[tuple[int, str]]:
    """Comments on lines of their own, neighbours joined."""
    first, last, lines = 0, -1, list[str]()
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type != tokenize.COMMENT or token.line.lstrip()[:1] != "#" or token.string.startswith("#!"):
                continue
            if token.start[0] != last + 1 and lines:
                yield first, "\n".join(lines)
                lines = []
            first, last = token.start[0] if not lines else first, token.start[0]
            lines.append(token.string.lstrip("#:").strip())
    except tokenize.TokenError as error:
        raise SyntaxError(str(error)) from error
    if lines:
        yield first, "\n".join(lines)
