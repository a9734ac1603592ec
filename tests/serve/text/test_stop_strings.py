import random

import pytest

from ml.serve.text.stop_strings import StoppableText
from ml.serve.text.text_stream import TextStream


def _decode(ids):
    return bytes(ids).decode("utf-8", errors="replace")


def _text(*stop, **options):
    return StoppableText(TextStream(_decode), stop, **options)


def test_holds_back_only_what_may_become_a_stop_string():
    text = _text("STOP", "\n\n")
    assert [text.push(piece.encode()) for piece in ("a", "S", "T", "x", "\n", "b\n", "c")] == [
        "a", "", "", "STx", "", "\nb", "\nc",
    ]  # fmt: skip
    assert (text.finish(), text.stopped, text.text) == ("", None, "aSTx\nb\nc")


def test_a_stop_string_ends_the_text_wherever_tokens_are_cut():
    whole = "one SEE tw€ STOP three"
    for seed in range(20):
        rng, ids = random.Random(seed), list(whole.encode())
        text, shown = _text("STOP", "zz"), ""
        while ids:
            size = rng.randrange(1, 6)
            shown += text.push(ids[:size])
            ids = ids[size:]
        assert shown + text.finish() == text.text == "one SEE tw€ "
        assert text.stopped == "STOP"
        assert text.tokens == len("one SEE tw€ STOP".encode())


def test_the_stop_string_may_be_part_of_the_text():
    text = _text("END", include_stop=True)
    assert text.push(b"so END of") == "so END"
    assert text.push(b"more") == text.finish() == ""


def test_the_first_complete_stop_string_counts():
    text = _text("abcd", "bc", "xbc")
    assert (text.push(b"-abcd"), text.stopped) == ("-a", "bc")
    text = _text("bc", "abc")  # both complete at once: the one that begins first
    assert (text.push(b"-abcd"), text.stopped) == ("-", "abc")


def test_a_stop_string_that_repeats_itself():
    text = _text("aab")
    assert text.push(b"aaa") == "a"
    assert text.push(b"b") == ""
    assert text.stopped == "aab"


def test_the_rest_comes_when_the_sample_ends_by_itself():
    text = _text("STOP")
    assert text.push(b"go ST") == "go "
    assert text.finish() == "ST"
    text = _text("\N{REPLACEMENT CHARACTER}")
    assert text.push("x€".encode()[:-1]) == "x"
    assert (text.finish(), text.stopped) == ("", "\N{REPLACEMENT CHARACTER}")


def test_stop_strings_before_min_tokens_are_text():
    text = _text("\n", min_tokens=3)
    assert text.push(b"\n\nab\nc") == "\n\nab"
    assert text.stopped == "\n"


def test_without_stop_strings_nothing_is_held():
    text = _text()
    assert [text.push([b]) for b in b"abc"] == ["a", "b", "c"]


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="stop: "):
        _text("")
