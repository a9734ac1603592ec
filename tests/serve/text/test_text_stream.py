import random

import pytest

from ml.serve.text.text_stream import TextStream

TEXT = "naïve €uro 漢字 👩‍👩‍👧 e\u0301 \N{REPLACEMENT CHARACTER} ok 🎉"


def _bytes(ids):
    """A byte-level tokenizer."""
    return bytes(ids).decode("utf-8", errors="replace")


def _byte_fallback(ids):
    """A tokenizer of the SentencePiece kind: a run of bytes is a text as a whole, or one U+FFFD per byte."""
    out, run = [], []
    for i in [*ids, None]:
        if i is not None and i >= 128:
            run.append(i)
            continue
        if run:
            try:
                out.append(bytes(run).decode())
            except UnicodeDecodeError:
                out.append("\N{REPLACEMENT CHARACTER}" * len(run))
            run = []
        if i is not None:
            out.append(chr(i))
    return "".join(out).removeprefix(" ")


def _pieces(ids, sizes):
    ids, out = list(ids), []
    while ids:
        size = next(sizes)
        out.append(ids[:size])
        ids = ids[size:]
    return out


@pytest.mark.parametrize("decode", [_bytes, _byte_fallback])
@pytest.mark.parametrize("seed", range(6))
def test_pieces_join_to_the_whole_and_never_hold_half_a_character(decode, seed):
    rng = random.Random(seed)
    sizes = iter(lambda: rng.choice([1, 1, 2, 3, 8]) if seed else 1, None)
    stream = TextStream(decode)
    given = ""
    for piece in _pieces(TEXT.encode(), sizes):
        given += stream.push(piece)
        assert decode(TEXT.encode()).startswith(given)
    assert given + stream.finish() == decode(TEXT.encode())


def test_characters_come_as_soon_as_they_are_whole():
    stream = TextStream(_bytes)
    assert [stream.push([b]) for b in "a€b".encode()] == ["a", "", "", "€", "b"]
    assert stream.finish() == ""


def test_a_text_that_ends_inside_a_character():
    stream = TextStream(_bytes)
    assert stream.push("x€".encode()[:-1]) == "x"
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"
    assert stream.finish() == ""


def test_bytes_that_never_become_text_are_not_held_forever():
    stream = TextStream(_bytes)
    given = "".join(stream.push([0xFF]) for _ in range(20))
    assert len(given) >= 16
    assert given + stream.finish() == "\N{REPLACEMENT CHARACTER}" * 20


def test_random_bytes():
    rng = random.Random(1)
    for _ in range(30):
        ids = [rng.randrange(256) for _ in range(40)]
        stream = TextStream(_bytes)
        given = "".join(stream.push(piece) for piece in _pieces(ids, iter(lambda: rng.randrange(1, 6), None)))
        assert given + stream.finish() == _bytes(ids)


def test_continues_the_prompt():
    # Alone, the decoder would drop the leading space of the completion.
    stream = TextStream(_byte_fallback, prompt=b"Hello")
    assert stream.push(b" world") == " world"
    assert stream.push(b" again") == " again"


def test_work_per_piece_does_not_grow_with_the_text():
    longest = 0

    def decode(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return _bytes(ids)

    stream = TextStream(decode)
    for byte in ("ab漢€" * 200).encode():
        stream.push([byte])
    assert longest < 16


def test_a_long_prompt_is_not_decoded_as_a_whole():
    longest = 0

    def decode(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return _byte_fallback(ids)

    # Wherever the end of the prompt is cut, what follows it reads the same.
    for prompt in ("ab漢字€ " * 300, "漢" * 300, "x" * 500 + "é🎉🎉", "é" * 300 + "漢"):
        for text in ("字 b", " 字 b"):
            stream = TextStream(decode, prompt.encode())
            assert stream.push(text.encode()) + stream.finish() == text
    assert longest < 80
