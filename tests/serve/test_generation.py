import dataclasses
import functools

import jax
import numpy as np
import pytest

from ml.errors import UserError
from ml.models import MoEConfig, Transformer, TransformerConfig, init_params
from ml.serve import generation
from ml.serve.generation import Generator
from ml.serve.sampling import SamplingParams

CONFIG = TransformerConfig(
    vocab_size=61,
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=48,
    max_length=48,
    # Large, so that greedy text is lively rather than one token again and again.
    init_stddev=0.3,
)
ARCHITECTURES = {
    "plain": {},
    "experts": {
        "moe": MoEConfig(num_experts=4, top_k=2, mlp_dim=24),
        "sliding_window": 4,
        "window_pattern": ("local", "global"),
        "position_embedding": "learned",
    },
}
PROMPTS = [[3, 1, 4, 1, 5], [9], list(range(20, 37)), [8, 8]]
GREEDY = SamplingParams(max_tokens=14, temperature=0.0)


@functools.cache
def _weights(name="plain"):
    config = dataclasses.replace(CONFIG, **ARCHITECTURES[name])
    return config, jax.jit(init_params, static_argnums=0)(Transformer(config), jax.random.key(5))


def _generator(name="plain", **kwargs):
    config, params = _weights(name)
    return Generator(config, params, **{"steps_per_dispatch": 4, **kwargs})


@functools.cache
def _forward(name):
    return jax.jit(functools.partial(Transformer(_weights(name)[0]).apply, method="forward"))


def _slow_greedy(name, prompt, max_tokens):
    """No cache, no batch, no padding that anything could see: the whole sequence again for every token."""
    config, params = _weights(name)
    forward = _forward(name)
    tokens = list(prompt)
    for _ in range(max_tokens):
        padded = np.zeros((1, config.max_length), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(forward({"params": params}, padded)[0, len(tokens) - 1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_equals_the_slow_loop(name):
    completions = _generator(name).generate(PROMPTS, GREEDY)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        assert completion.tokens == _slow_greedy(name, prompt, 14)
        assert completion.finish_reason == "length"
    assert len({token for completion in completions for token in completion.tokens}) > 8


def test_more_prompts_than_the_batch_holds():
    seen = [[] for _ in PROMPTS]
    completions = _generator(max_batch=3).generate(PROMPTS, GREEDY, lambda i, new: seen[i].extend(new))
    assert completions == _generator().generate(PROMPTS, GREEDY)
    assert seen == [completion.tokens for completion in completions]


def test_row_is_independent_of_its_neighbours():
    mine = SamplingParams(max_tokens=20, temperature=0.9, seed=42)
    alone = _generator().generate([PROMPTS[0]], mine)[0]
    assert alone.tokens != _generator().generate([PROMPTS[0]], dataclasses.replace(mine, seed=43))[0].tokens
    others = [
        SamplingParams(max_tokens=3, temperature=0.0),
        SamplingParams(max_tokens=31, seed=42, top_p=0.8),
        SamplingParams(max_tokens=9, top_k=4, seed=1),
    ]
    first = _generator().generate(PROMPTS, [mine, *others])
    assert first[0] == alone
    last = _generator(steps_per_dispatch=7).generate([*PROMPTS[:0:-1], PROMPTS[0]], [*others[::-1], mine])
    assert last[3] == alone
    assert last[::-1] == first


def test_stop_token_ends_its_row_only_and_is_left_out():
    free = _generator().generate(PROMPTS, GREEDY)
    stop = free[0].tokens[5]
    cut = free[0].tokens.index(stop)
    expected = [f.tokens[: f.tokens.index(stop)] if stop in f.tokens else f.tokens for f in free]
    stopped = _generator(stop_ids=[stop]).generate(PROMPTS, GREEDY)
    assert [s.tokens for s in stopped] == expected
    assert stopped[0].finish_reason == "stop"
    assert len(stopped[0].tokens) == cut
    # Asked for by one request: the others run on.
    own = [dataclasses.replace(GREEDY, stop_token_ids=(stop, 60, 59, 58, 57)), GREEDY, GREEDY, GREEDY]
    assert [c.tokens for c in _generator().generate(PROMPTS, own)][1:] == [f.tokens for f in free][1:]
    assert _generator().generate(PROMPTS, own)[0].finish_reason == "stop"


def test_stop_token_first():
    stop = _generator().generate([PROMPTS[0]], GREEDY)[0].tokens[0]
    (completion,) = _generator(stop_ids=[stop]).generate([PROMPTS[0]], GREEDY)
    assert (completion.tokens, completion.finish_reason) == ([], "stop")


def test_the_device_stops_drawing_by_itself():
    config, params = _weights()
    free = _generator().generate([PROMPTS[0]], GREEDY)[0].tokens
    cut = next(i for i in range(1, 9) if free[i] not in free[:i])
    tokens, batch = generation._pad([PROMPTS[0]], [GREEDY], [frozenset([free[cut]])], 16, 16)
    model = Transformer(config)
    cache, rows = generation._prefill(model, params, tokens, batch)
    _, rows, chunk = generation._decode(model, 10, params, cache, rows, batch)
    assert chunk.tolist() == [free[1 : cut + 1] + [-1] * (10 - cut)]
    assert (rows.done.tolist(), rows.drawn.tolist()) == ([True], [cut + 1])


@pytest.mark.parametrize("max_tokens", [1, 4, 5, 6])
def test_max_tokens_around_a_dispatch(max_tokens):
    requests = [SamplingParams(max_tokens=m, temperature=0.0) for m in (max_tokens, 9)]
    first, second = _generator().generate(PROMPTS[:2], requests)
    assert first.tokens == _slow_greedy("plain", PROMPTS[0], max_tokens)
    assert len(second.tokens) == 9


def test_tokens_are_reported_as_they_come():
    reports = []
    _generator().generate([PROMPTS[0]], GREEDY, lambda i, new: reports.append((i, len(new))))
    assert reports == [(0, 1), (0, 4), (0, 4), (0, 4), (0, 1)]


def test_fills_the_model_to_its_last_position():
    prompt = PROMPTS[2]
    room = CONFIG.max_length - len(prompt)
    for name in ("plain", "experts"):
        (completion,) = _generator(name).generate([prompt], SamplingParams(max_tokens=room, temperature=0.0))
        assert completion.tokens == _slow_greedy(name, prompt, room)


def test_no_prompts():
    assert _generator().generate([], GREEDY) == []


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ([], 4, "prompt 1 is empty"),
        ([1] * 40, 9, "set max_tokens to at most 8"),
        ([1] * 48, 1, "shorten the prompt to at most 47 tokens"),
        ([61], 4, "61 embeddings"),
        ([-1, 2], 4, "61 embeddings"),
    ],
)
def test_refuses(prompt, max_tokens, message):
    with pytest.raises(UserError, match=message):
        _generator().generate([[1], prompt], [SamplingParams(max_tokens=1), SamplingParams(max_tokens=max_tokens)])


def test_refuses_what_only_the_engine_does():
    with pytest.raises(UserError, match=r"prompt 0: n=2: use ml\.serve\.Engine"):
        _generator().generate([[1]], SamplingParams(n=2))


def test_few_programs_are_compiled():
    generator = _generator(steps_per_dispatch=5)  # a step count that no other test compiles
    before = generation._decode._cache_size()
    for count, length, max_tokens in [(3, 17, 3), (4, 20, 12), (3, 31, 1), (4, 18, 2)]:
        prompts = [[i + 1] * length for i in range(count)]
        generator.generate(prompts, SamplingParams(max_tokens=max_tokens, temperature=0.0))
    assert generation._decode._cache_size() == before + 1


def test_cache_is_donated_and_updated_in_place():
    config = dataclasses.replace(CONFIG, num_layers=8, max_length=4096)
    params = jax.jit(init_params, static_argnums=0)(Transformer(config), jax.random.key(0))
    tokens, batch = generation._pad([[1, 2]], [GREEDY], [frozenset()], 16, 4096)
    model = Transformer(config)
    cache, rows = generation._prefill(model, params, tokens, batch)
    arguments = (model, 4, params, cache, rows, batch)
    memory = generation._decode.lower(*arguments).compile().memory_analysis()
    if memory is not None:  # not every backend tells
        assert memory.alias_size_in_bytes >= 2 * cache.key.nbytes
        # One layer is read at a time; a copy would hold all of them.
        assert memory.temp_size_in_bytes < cache.key.nbytes
    generation._decode(*arguments)
    assert cache.key.is_deleted()
    assert cache.value.is_deleted()
