"""Masks of structured outputs are those of a search through all texts that the grammar allows."""

import functools
import itertools
import json
import random

import numpy as np
import pytest
import tokenizers

from ml.data.tokenizer import Tokenizer
from ml.errors import UserError
from ml.serve.grammar import Grammars, StructuredOutput

SAMPLE = ['{"name": "abc", "ages": [1, 22, 333], "ok": true, "no": false, "nothing": null}', "abab cdcd éé 漢字 🎉"] * 9
PADDING = 37  # embeddings that the tokenizer does not know


@functools.cache
def _tokenizer():
    return Tokenizer.train(SAMPLE, 320)


def _grammars(stop_ids=None):
    tokenizer = _tokenizer()
    return Grammars(tokenizer, tokenizer.vocab_size + PADDING, [tokenizer.eos_id] if stop_ids is None else stop_ids)


@functools.cache
def _token_bytes():
    """What each token stands for; special ones for nothing."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}
    vocabulary = tokenizers.Tokenizer.from_str(_tokenizer().to_json()).get_vocab()
    return {i: bytes(byte_of[c] for c in s) for s, i in vocabulary.items() if i != _tokenizer().eos_id}


def _allowed(matcher):
    return set(np.flatnonzero(np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")).tolist())


def _expected(texts, written, stops):
    going_on = {t for t, b in _token_bytes().items() if any(text.startswith(written + b) for text in texts)} - stops
    return going_on | (stops if written in texts else set())


CHOICES = ("a", "ab", "abab", "c.d|*", "éa", "漢字", '"\\\n', "ab 🎉", "\x7f")
# A structured output, and all its texts.
FINITE = {
    "choice": (StructuredOutput(choice=CHOICES), CHOICES),
    "regex": (
        StructuredOutput(regex="^(ab|c){1,3}(é|漢)?$"),
        ["".join(x) + y for n in (1, 2, 3) for x in itertools.product(("ab", "c"), repeat=n) for y in ("", "é", "漢")],
    ),
    "schema": (
        StructuredOutput(json_schema={"enum": ["abc", 22, 333, None, True, 'a"b']}),
        ['"abc"', "22", "333", "null", "true", '"a\\"b"'],
    ),
}


@pytest.mark.parametrize("name", FINITE)
@pytest.mark.parametrize("stops", ["end", "none", "two"])
def test_masks_are_those_of_a_search(name, stops):
    wanted, texts = FINITE[name]
    texts = {text.encode() for text in texts}
    also_text = next(t for t, b in _token_bytes().items() if b == b"ab")
    stops = {"end": {_tokenizer().eos_id}, "none": set(), "two": {_tokenizer().eos_id, also_text}}[stops]
    left, seen = [(_grammars().matcher(wanted, stops), b"")], set()
    while left:
        matcher, written = left.pop()
        expected, allowed = _expected(texts, written, stops), _allowed(matcher)
        following = {text[len(written) :][:1] for text in texts if text.startswith(written)}
        if len(following) == 1 and written not in texts:
            # Where only one byte can follow, the library asks for the token that the tokenizer itself would choose.
            assert allowed and allowed <= expected, written
        else:
            assert allowed == expected, written
        assert matcher.finished == (expected <= stops)
        for token in expected - stops:
            further = written + _token_bytes()[token]
            if further not in seen:
                seen.add(further)
                copy = matcher.copy()
                copy.advance([token])
                left.append((copy, further))
    assert seen >= texts


@pytest.mark.parametrize(
    ("wanted", "good", "bad"),
    [
        (StructuredOutput(json_object=True), ['{"a": [1, {"b": "é"}]}', "{\n}"], ["[1]", '{"a" 1}', '"a"']),
        (StructuredOutput(regex=r"\d+-[^x]*"), ["12-", "1-abc"], ["-", "1-x"]),
        (StructuredOutput(json_schema='{"type": "array", "items": {"type": "integer"}}'), ["[1, 22]", "[]"], ['["1"]']),
    ],
)
def test_texts_as_the_tokenizer_writes_them(wanted, good, bad):
    for text in good:
        matcher = _grammars().matcher(wanted)
        matcher.advance(_tokenizer().encode(text))
        assert _tokenizer().eos_id in _allowed(matcher), text
    for text in bad:
        matcher = _grammars().matcher(wanted)
        with pytest.raises(UserError, match="structured_output: "):
            matcher.advance(_tokenizer().encode(text))


def test_white_space_does_not_go_on_for_ever():
    matcher = _grammars().matcher(StructuredOutput(json_object=True))
    matcher.advance(_tokenizer().encode("{"))
    space = _tokenizer().encode("\n")
    for _ in range(32):
        assert space[0] in _allowed(matcher)
        matcher.advance(space)
    assert space[0] not in _allowed(matcher)


def test_random_walks_end_in_whole_texts():
    rng = random.Random(0)
    schema = {
        "type": "object",
        "properties": {
            "ages": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3}
        },
        "required": ["ages"],
        "additionalProperties": False,
    }
    for _ in range(30):
        matcher, text = _grammars().matcher(StructuredOutput(json_schema=schema)), []
        while not matcher.finished:
            # Short tokens first, so that white space does not take over.
            allowed = sorted(_allowed(matcher) - {_tokenizer().eos_id}, key=lambda t: (_token_bytes()[t].isspace(), t))
            text.append(rng.choice(allowed[:8]))
            matcher.advance(text[-1:])
        assert set(json.loads(_tokenizer().decode(text))) == {"ages"}


def test_compiles_once_and_tells_the_order_of_properties_apart():
    grammars = _grammars()
    one, two = {"type": "object", "properties": {"a": {}}}, {"properties": {"a": {}}, "type": "object"}
    for schema in (one, json.dumps(one), dict(one), two):
        grammars.compile(StructuredOutput(json_schema=schema))
    assert len(grammars._compiled) == 2
    for i in range(300):
        grammars.compile(StructuredOutput(regex=f"a{i}"))
    assert len(grammars._compiled) == 256


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "structured_output: has none of its fields: give exactly one"),
        ({"regex": "a", "json_object": True}, "structured_output: has json_object and regex"),
        ({"json_schema": "{"}, "structured_output.json_schema: is not JSON"),
        ({"json_schema": "[]"}, "structured_output.json_schema: must be an object.* not list"),
        ({"json_schema": {"enum": {1}}}, "structured_output.json_schema: is not JSON"),
        ({"regex": 3}, "structured_output.regex=3: must be a text"),
        ({"choice": "abc"}, "structured_output.choice='abc': must be a list"),
        ({"choice": ["a", ""]}, "structured_output.choice=.*none of them empty"),
        ({"choice": []}, "structured_output.choice: is empty"),
    ],
)
def test_refuses_wrong_fields(fields, message):
    with pytest.raises(UserError, match=message):
        StructuredOutput(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"json_schema": {"type": "strin"}}, "structured_output.json_schema: Invalid type: strin"),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "structured_output.json_schema: .*uniqueItems"),
        ({"json_schema": {"enum": []}}, "structured_output.json_schema: Unsatisfiable"),
        ({"json_schema": {"type": "string", "pattern": "(?=a)"}}, "structured_output.json_schema: .*look-around"),
        ({"regex": "a(b"}, "structured_output.regex: .*unclosed group"),
        ({"regex": "(?=a)b"}, "structured_output.regex: .*look-around"),
        ({"regex": ""}, "structured_output.regex: allows no text but the empty one"),
    ],
)
def test_refuses_what_cannot_be_compiled(fields, message):
    with pytest.raises(UserError, match=message) as caught:
        _grammars().matcher(StructuredOutput(**fields))
    assert "\n" not in str(caught.value)


def test_refuses_a_tokenizer_that_is_unknown_to_the_library():
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "a": 1}, unk_token="a"))
    with pytest.raises(UserError, match=r"structured_output: this tokenizer cannot be used: .*decoder"):
        Grammars(Tokenizer(words), 64, [0])
