"""Docstrings and comments of Python source, and prose in sentences."""

import pytest

from ml.data.prose import prose, sentences

SOURCE = '''#!/usr/bin/env python
"""What the module
    is for."""

# A comment
# of two lines.

x = "no prose"  # behind code


def f():
    # ------
    """Does it.

    And more.
    """
    # inside
    class C:
        """Of a class."""
'''


def test_prose_is_docstrings_and_comments_on_lines_of_their_own():
    assert list(prose(SOURCE)) == [
        "What the module\nis for.",
        "A comment\nof two lines.",
        "Does it.\n\nAnd more.",
        "inside",
        "Of a class.",
    ]


@pytest.mark.parametrize("source", ["def f(:\n", '"""open\n'])
def test_what_is_no_python_is_a_syntax_error(source):
    with pytest.raises(SyntaxError):
        list(prose(source))


def test_sentences_end_at_full_stops_and_blank_lines():
    text = 'See RFC 2616. It is\n  long (very long.) "Yes?" No.\n\nA title\n\ne.g. lower case goes on. 3 more!'
    assert sentences(text) == [
        "See RFC 2616.",
        "It is long (very long.)",
        '"Yes?"',
        "No.",
        "A title",
        "e.g. lower case goes on.",
        "3 more!",
    ]
