"""A model that writes garbage keeps to the grammar that a request asks for, and disturbs nobody who asks for none."""

import dataclasses
import functools
import json
import re

import jax
import jsonschema
import numpy as np
import pytest

from ml.data.tokenizer import Tokenizer
from ml.errors import UserError
from ml.models import Transformer, TransformerConfig, init_params
from ml.serve.engine import Engine, EngineConfig
from ml.serve.grammar import Grammars, Matcher, StructuredOutput
from ml.serve.sampling import Constraints, SamplingParams
from ml.serve.scheduling.request import FinishReason

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 3},
        "ages": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 120}, "maxItems": 2},
    },
    "required": ["name", "ages"],
    "additionalProperties": False,
}
# Not \d: which characters are digits depends on the version of Unicode, and Python has its own.
REGEX = r"([0-9]{2}-){2}[a-c]{1,4}(é|!)"
CHOICES = ("yes", "no", "not at all", "漢字")
WANTED = {
    "schema": StructuredOutput(json_schema=SCHEMA),
    "regex": StructuredOutput(regex=REGEX),
    "choice": StructuredOutput(choice=CHOICES),
}


@functools.cache
def _tokenizer():
    return Tokenizer.train(['{"name": "abc", "ages": [1, 22]} yes no 漢字'] * 9, 300)


@functools.cache
def _weights():
    config = TransformerConfig(
        vocab_size=_tokenizer().vocab_size + 21,  # padded, and no multiple of 32
        num_layers=1,
        embed_dim=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_dim=48,
        max_length=96,
        init_stddev=0.3,
    )
    return config, jax.jit(init_params, static_argnums=0)(Transformer(config), jax.random.key(5))


def _engine(stop=True, **changes):
    config, params = _weights()
    stop_ids = [_tokenizer().eos_id] if stop else []
    # One row, so that few programs are compiled.
    engine = EngineConfig(page_size=4, max_running=1, token_budget=16, decode_steps=1, share="never")
    engine = dataclasses.replace(engine, **changes)
    return Engine(
        config, params, engine, stop_ids=stop_ids, grammars=Grammars(_tokenizer(), config.vocab_size, stop_ids)
    )


def _prompts(count):
    rng = np.random.default_rng(count)
    return [rng.integers(1, 290, rng.integers(1, 24)).tolist() for _ in range(count)]


def _check(name, completion):
    assert completion.finish_reason == "stop"
    text = _tokenizer().decode(completion.tokens, skip_special=False)
    if name == "schema":
        jsonschema.validate(json.loads(text), SCHEMA)
    elif name == "regex":
        assert re.fullmatch(REGEX, text)
    else:
        assert text in CHOICES


# White space, which a random model would pile up.
BLANK = {t: -100.0 for t in range(300) if not _tokenizer().decode([t]).strip()}


def _asked(name, seed, **changes):
    params = SamplingParams(
        max_tokens=60, temperature=seed % 2, seed=seed, logit_bias=BLANK, structured_output=WANTED[name]
    )
    return dataclasses.replace(params, **changes)


def test_every_text_is_as_asked_for():
    names = [*WANTED, *WANTED]
    engine = _engine()
    completions = engine.generate(_prompts(6), [_asked(name, seed) for seed, name in enumerate(names)])
    for name, (completion,) in zip(names, completions, strict=True):
        _check(name, completion)
    assert not engine._constrained._matchers


@pytest.mark.slow
@pytest.mark.parametrize("stop", [True, False])
def test_in_a_crowd_that_is_preempted(stop):
    names = [name for name in WANTED for _ in range(8)]
    asked = [
        _asked(name, i, logprobs=1 if i % 3 == 0 else None, n=1 + i % 2, min_tokens=3 if name == "schema" else 0)
        for i, name in enumerate(names)
    ]
    free = [SamplingParams(max_tokens=20, temperature=0.7 * (i % 2), seed=i) for i in range(4)]
    prompts = _prompts(len(asked) + len(free))
    crowd = {"max_running": 8, "decode_steps": 4}
    engine = _engine(stop, cache_tokens=200, **crowd)
    together = engine.generate(prompts, free + asked)
    assert engine.statistics.preemptions
    for name, completions in zip(names, together[len(free) :], strict=True):
        for completion in completions:
            _check(name, completion)
            assert completion.logprobs is None or len(completion.logprobs) == len(completion.tokens)
    assert not engine._constrained._matchers
    alone = _engine(stop, **crowd).generate(prompts[: len(free)], free)
    assert [c.tokens for (c,) in alone] == [c.tokens for (c,) in together[: len(free)]]
    # Its own seed alone decides, here too.
    again = _engine(stop, **crowd).generate(prompts[len(free) :][:3], asked[:3])
    assert [c.tokens for each in again for c in each] == [c.tokens for each in together[len(free) :][:3] for c in each]


def test_what_the_grammar_leaves_open_ends_as_any_text_does():
    params = SamplingParams(max_tokens=9, logit_bias=BLANK, structured_output=StructuredOutput(regex="[ab]+"))
    greedy = dataclasses.replace(params, temperature=0.0, ignore_eos=True)
    (drawn,), (likeliest,) = _engine().generate(_prompts(2), [params, greedy])
    assert re.fullmatch("[ab]+", _tokenizer().decode(drawn.tokens, skip_special=False))
    assert re.fullmatch("[ab]+", _tokenizer().decode(likeliest.tokens, skip_special=False))
    assert likeliest.finish_reason == "length" and len(likeliest.tokens) == 9


def test_any_json_object():
    asked = SamplingParams(max_tokens=40, logit_bias=BLANK, structured_output=StructuredOutput(json_object=True), n=12)
    (completions,) = _engine().generate(_prompts(1), asked)
    whole = [json.loads(_tokenizer().decode(c.tokens)) for c in completions if c.finish_reason == "stop"]
    assert whole and all(isinstance(each, dict) for each in whole)
    assert all(_tokenizer().decode(c.tokens).startswith("{") for c in completions)


@pytest.mark.slow
def test_a_grammar_that_fails_takes_only_its_own_request_with_it(monkeypatch):
    advance = Matcher.advance

    def fail(self, tokens):
        calls.append(self)
        if len(calls) == 3:
            raise UserError("structured_output: too large to follow")
        advance(self, tokens)

    calls = []
    engine = _engine(max_running=2)
    asked = SamplingParams(max_tokens=60, logit_bias=BLANK, structured_output=WANTED["schema"])
    (bad,) = engine.add(_prompts(1)[0], asked, "bad")
    (free,) = engine.add(_prompts(1)[0], SamplingParams(max_tokens=30, temperature=0.0), "free")
    monkeypatch.setattr(Matcher, "advance", fail)
    seen = []
    while engine.unfinished:
        seen += [update for update, _ in engine.step()]
    assert bad.finish_reason is FinishReason.FAILED and len(bad.output) == 3
    assert [u.finish_reason for u in seen if u.sequence is bad] == [None, None, None, FinishReason.FAILED]
    assert len(free.output) == 30
    assert not engine._constrained._matchers and engine._scheduler.memory.held == 0


def test_cancelling_forgets_the_grammar():
    engine = _engine()
    engine.add([1, 2], SamplingParams(max_tokens=50, logit_bias=BLANK, structured_output=WANTED["schema"], n=2), "gone")
    engine.step()
    engine.cancel("gone")
    assert not engine._constrained._matchers
    while engine.unfinished:
        engine.step()


def test_refuses():
    engine = _engine()
    with pytest.raises(UserError, match=r"structured_output\.regex: .*unclosed"):
        engine.add([1], SamplingParams(structured_output=StructuredOutput(regex="(")))
    without = Engine(*_weights(), EngineConfig(page_size=4, max_running=2, token_budget=16))
    with pytest.raises(UserError, match=r"structured_output\.regex: this engine has no grammars"):
        without.add([1], SamplingParams(structured_output=StructuredOutput(regex="a")))
    assert not engine.unfinished and not without.unfinished


def test_the_mask_on_the_device():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 77)).astype(np.float32)
    allowed = rng.random((3, 77)) < 0.3
    allowed[1] = True
    bits = np.packbits(np.pad(allowed, ((0, 0), (0, 96 - 77))), axis=1, bitorder="little").view(np.uint32)
    none = np.full((3, 1), 77, np.int32), np.zeros((3, 1), np.float32)
    masked = np.asarray(jax.jit(Constraints.apply)(Constraints(*none, bits), logits))
    np.testing.assert_array_equal(masked, np.where(allowed, logits, -np.inf))
