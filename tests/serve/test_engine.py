"""The engine's greedy text is that of the whole forward, whatever runs beside it, is cached, shared or preempted."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest

from ml.errors import UserError
from ml.models import MoEConfig, Transformer, TransformerConfig, init_params
from ml.serve.engine import Engine, EngineConfig
from ml.serve.sampling import SamplingParams

# Each engine compiles its own handful of programs.
pytestmark = pytest.mark.slow

CONFIG = TransformerConfig(
    vocab_size=61,
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=48,
    max_length=96,
    # Large, so that greedy text is lively rather than one token again and again.
    init_stddev=0.3,
)
ARCHITECTURES = {
    "plain": {},
    "experts": {
        "moe": MoEConfig(num_experts=4, top_k=2, mlp_dim=24),
        "sliding_window": 8,
        "window_pattern": ("local", "global"),
        "position_embedding": "learned",
    },
}
# One small shape for all tests, so that few programs are compiled.
SMALL = EngineConfig(page_size=4, max_running=8, token_budget=16, decode_steps=4, share="never")


@functools.cache
def _weights(name="plain"):
    config = dataclasses.replace(CONFIG, **ARCHITECTURES[name])
    return config, jax.jit(init_params, static_argnums=0)(Transformer(config), jax.random.key(5))


def _engine(name="plain", stop_ids=(), **changes):
    return Engine(*_weights(name), dataclasses.replace(SMALL, **changes), stop_ids=stop_ids)


@functools.cache
def _forward(name):
    return jax.jit(functools.partial(Transformer(_weights(name)[0]).apply, method="forward"))


@functools.cache
def _slow_greedy(name, prompt, max_tokens):
    """No cache, no batch, no padding that anything could see: the whole sequence again for every token."""
    config, params = _weights(name)
    tokens = list(prompt)
    for _ in range(max_tokens):
        padded = np.zeros((1, config.max_length), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(_forward(name)({"params": params}, padded)[0, len(tokens) - 1].argmax()))
    return tokens[len(prompt) :]


def _prompts(count=24, seed=0):
    """Prompts of 1 to 40 tokens; most begin as one of three prefixes do."""
    rng = np.random.default_rng(seed)
    prefixes = [rng.integers(0, 61, n).tolist() for n in (0, 9, 21)]
    return [tuple(prefixes[rng.integers(3)] + rng.integers(0, 61, rng.integers(1, 20)).tolist()) for _ in range(count)]


def _requests(count, seed=1):
    rng = np.random.default_rng(seed)
    return [SamplingParams(max_tokens=int(m), temperature=0.0) for m in rng.integers(1, 14, count)]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"share": "always"},
        # Little room: sequences lose their pages and come back.
        {"cache_tokens": 100, "schedule": "prefix"},
        {"decode_steps": 1, "token_budget": 8},
    ],
    ids=["plain", "shared", "preempted", "small_chunks"],
)
def test_greedy_text_is_that_of_the_whole_forward(name, changes):
    prompts, requests = _prompts(), _requests(24)
    engine = _engine(name, **changes)
    for _ in range(2):  # the second time from the cache
        for prompt, request, (completion,) in zip(prompts, requests, engine.generate(prompts, requests), strict=True):
            assert completion.tokens == _slow_greedy(name, prompt, 13)[: request.max_tokens]
            assert completion.finish_reason == "length"
    assert engine.statistics.cached > 0
    if "cache_tokens" in changes:
        assert engine.statistics.preemptions > 0


def test_samples_share_their_prompt_and_differ_by_seed():
    engine = _engine(share="always")
    params = SamplingParams(max_tokens=10, n=5, seed=7)
    (completions,) = engine.generate([_prompts()[0]], params)
    assert len({tuple(c.tokens) for c in completions}) > 3
    for index, completion in enumerate(completions):
        ((alone,),) = _engine().generate([_prompts()[0]], dataclasses.replace(params, n=1, seed=7 + index))
        assert alone.tokens == completion.tokens


def test_a_seed_gives_its_text_in_any_company():
    prompts = _prompts(6)
    mine = SamplingParams(max_tokens=12, seed=3, top_p=0.9, presence_penalty=0.5, logit_bias={4: 2.0})
    ((alone,),) = _engine().generate(prompts[:1], mine)
    others = [SamplingParams(max_tokens=9, seed=s) for s in range(5)]
    together = _engine().generate(prompts, [mine, *others])
    assert together[0][0].tokens == alone.tokens


def test_penalties_are_those_of_numpy():
    config, params = _weights()
    prompt = _prompts()[3]
    wanted = SamplingParams(
        max_tokens=12, temperature=0.0, presence_penalty=0.7, frequency_penalty=0.4, repetition_penalty=1.3
    )
    ((completion,),) = _engine().generate([prompt], wanted)
    text = []
    for _ in range(12):
        padded = np.zeros((1, config.max_length), np.int32)
        padded[0, : len(prompt) + len(text)] = [*prompt, *text]
        logits = np.asarray(_forward("plain")({"params": params}, padded)[0, len(prompt) + len(text) - 1], np.float64)
        for token in {*prompt, *text}:
            logits[token] = logits[token] / 1.3 if logits[token] > 0 else logits[token] * 1.3
        for token in set(text):
            logits[token] -= 0.7 + 0.4 * text.count(token)
        text.append(int(logits.argmax()))
    assert completion.tokens == text
    assert text != _slow_greedy("plain", prompt, 12)


def test_logprobs():
    config, params = _weights()
    prompt = _prompts()[1]
    ((completion,),) = _engine().generate([prompt], SamplingParams(max_tokens=5, seed=1, logprobs=2))
    padded = np.zeros((1, config.max_length), np.int32)
    padded[0, : len(prompt) + 5] = [*prompt, *completion.tokens]
    expected = np.asarray(jax.nn.log_softmax(_forward("plain")({"params": params}, padded)[0]))
    assert len(completion.logprobs) == 5
    for i, (token, given) in enumerate(zip(completion.tokens, completion.logprobs, strict=True)):
        row = expected[len(prompt) - 1 + i]
        assert given.logprob == pytest.approx(row[token], abs=1e-4)
        assert list(given.top) == np.argsort(-row)[:2].tolist()
        assert given.rank == (row > row[token]).sum()


def test_stop_tokens_end_a_text_and_min_tokens_holds_them_off():
    prompt = _prompts()[2]
    free = _slow_greedy("plain", prompt, 12)
    stop = free[5]
    cut = free.index(stop)
    greedy = SamplingParams(max_tokens=12, temperature=0.0)
    ((completion,),) = _engine(stop_ids=[stop]).generate([prompt], greedy)
    assert (completion.tokens, completion.finish_reason) == (free[:cut], "stop")
    own = dataclasses.replace(greedy, stop_token_ids=(stop,))
    assert _engine().generate([prompt], own)[0][0].tokens == free[:cut]
    ((ignoring,),) = _engine(stop_ids=[stop]).generate([prompt], dataclasses.replace(greedy, ignore_eos=True))
    assert (ignoring.tokens, ignoring.finish_reason) == (free, "length")
    ((held,),) = _engine(stop_ids=[stop]).generate([prompt], dataclasses.replace(greedy, min_tokens=cut + 3))
    assert len(held.tokens) >= cut + 3
    assert stop not in held.tokens


def test_tokens_are_reported_as_they_come():
    seen = {0: [], 1: []}
    prompts = _prompts()[:2]
    completions = _engine().generate(
        prompts, SamplingParams(max_tokens=9, temperature=0.0), lambda i, new: seen[i].append(new)
    )
    for i in range(2):
        assert list(itertools.chain(*seen[i])) == completions[i][0].tokens
        assert len(seen[i]) > 2


def test_cancelling_frees_the_pages_and_leaves_the_others_alone():
    engine = _engine()
    prompts = _prompts()
    greedy = SamplingParams(max_tokens=12, temperature=0.0)
    (gone,), (kept,) = engine.add(prompts[0], greedy, "gone"), engine.add(prompts[1], greedy, "kept")
    for _ in range(3):
        engine.step()
    engine.cancel("gone")
    while engine.unfinished:
        engine.step()
    assert kept.output == _slow_greedy("plain", prompts[1], 12)
    assert gone.finish_reason.value == "cancelled" and len(gone.output) < 12
    assert engine._scheduler.memory.held == 0


def test_no_program_is_compiled_for_shapes_that_were_met_before():
    from ml.serve import runner

    engine = _engine()
    engine.generate(_prompts(), _requests(24))
    engine.generate(_prompts(seed=5), _requests(24))
    before = runner._run._cache_size()
    engine.generate(_prompts(seed=6), _requests(24, seed=7))
    assert runner._run._cache_size() - before <= 2  # an unlucky count of rows at most


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ([], 4, "prompt 1: .*is empty"),
        ([1] * 80, 30, "exceed max_length=96"),
        ([61], 4, "61 embeddings"),
        ([-1, 2], 4, "61 embeddings"),
    ],
)
def test_refuses(prompt, max_tokens, message):
    engine = _engine()
    with pytest.raises(UserError, match=message):
        engine.generate([[1], prompt], [SamplingParams(max_tokens=1), SamplingParams(max_tokens=max_tokens)])
    assert not engine.unfinished


def test_refuses_a_length_beyond_the_model():
    with pytest.raises(UserError, match="max_length=97"):
        _engine(max_length=97)
