"""What requests get from the engine: quick tests in one small shape; sweeps are in test_engine_exactness.py."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from engine_cases import (
    ARCHITECTURES,
    assert_exact,
    engine,
    greedy_requests,
    logits,
    logprobs,
    prompts,
    slow_greedy,
    weights,
)

from ml import memory_maps
from ml.errors import UserError
from ml.models import Transformer
from ml.serve import program
from ml.serve.engine import EngineConfig
from ml.serve.sampling import SamplingParams

GREEDY = SamplingParams(max_tokens=12, temperature=0.0)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "experts" else n for n in ARCHITECTURES]
)
def test_greedy_text_is_that_of_the_whole_forward(name):
    """Cold and cached, in company, several samples, with so little room that sequences lose their pages."""
    given, asked = prompts(20), greedy_requests(20, most_samples=2)
    tight = engine(name)
    for _ in range(2):
        assert_exact(name, given, asked, tight.generate(given, asked))
    assert tight.statistics.preemptions > 0
    assert tight.statistics.cached > 0
    assert_exact(name, given[:1], asked[:1], tight.generate(given[:1], asked[:1]))  # alone
    assert tight._scheduler.memory.held == 0


def test_a_seed_gives_its_text_in_any_company():
    given = prompts(6)
    mine = SamplingParams(max_tokens=12, seed=3, top_p=0.9, n=2)
    ((alone, second),) = engine().generate(given[:1], mine)
    others = [SamplingParams(max_tokens=9, seed=s) for s in range(5)]
    together = engine().generate([*given[1:], given[0]], [*others, mine])
    assert together[-1] == [alone, second]
    assert alone.tokens != second.tokens
    assert engine().generate(given[:1], dataclasses.replace(mine, n=1, seed=4)) == [[second]]


def test_stop_tokens_end_a_text_and_are_left_out():
    given = prompts()[:3]
    free = [slow_greedy("plain", prompt, 12) for prompt in given]
    stop = free[1][5]
    expected = [text[: text.index(stop)] if stop in text else text for text in free]
    stopped = engine(stop_ids=[stop]).generate(given, GREEDY)
    assert [c.tokens for (c,) in stopped] == expected
    assert stopped[1][0].finish_reason == "stop"
    own = dataclasses.replace(GREEDY, stop_token_ids=(stop, 60, 59))
    (mine,), (others,) = engine().generate([given[1]] * 2, [own, GREEDY])
    assert (mine.tokens, others.tokens) == (expected[1], free[1])
    ((ignoring,),) = engine(stop_ids=[stop]).generate(given[1:2], dataclasses.replace(GREEDY, ignore_eos=True))
    assert (ignoring.tokens, ignoring.finish_reason) == (free[1], "length")
    ((none,),) = engine(stop_ids=free[1][:1]).generate(given[1:2], GREEDY)
    assert (none.tokens, none.finish_reason) == ([], "stop")


@pytest.mark.sweep("4", "5")
@pytest.mark.parametrize("max_tokens", [1, 4, 5, 6])
def test_max_tokens_around_a_dispatch(max_tokens):
    given = prompts()[:2]
    asked = [dataclasses.replace(GREEDY, max_tokens=m) for m in (max_tokens, 9)]
    assert_exact("plain", given, asked, engine().generate(given, asked))


def test_fills_the_model_to_its_last_position():
    prompt = prompts()[1]
    room = 96 - len(prompt)
    ((completion,),) = engine().generate([prompt], SamplingParams(max_tokens=room, temperature=0.0))
    assert completion.tokens == slow_greedy("plain", prompt, room)


def test_tokens_are_reported_as_they_come():
    seen = {0: [], 1: []}
    completions = engine().generate(
        prompts()[:2], SamplingParams(max_tokens=9, temperature=0.0, n=2), lambda i, new: seen[i].append(new)
    )
    for i in range(2):
        assert list(itertools.chain(*seen[i])) == completions[i][0].tokens
        assert len(seen[i]) > 2


def test_log_probabilities_of_text_and_prompt_and_the_best_of_several():
    given = prompts()[1]
    asked = SamplingParams(max_tokens=5, seed=1, n=2, best_of=4, logprobs=2, prompt_logprobs=3)
    one = engine()
    one.generate([given], GREEDY)  # the prompt's log-probabilities need what is cached by now
    (best,) = one.generate([given], asked)
    expected = logprobs("plain", [*given, *best[0].tokens])
    places = [*itertools.pairwise([*given, *best[0].tokens])]
    of_all = [*best[0].prompt_logprobs[1:], *best[0].logprobs]
    assert len(of_all) == len(places) == len(given) + 4
    assert best[0].prompt_logprobs[0] is None
    for i, (entry, (_, token), row) in enumerate(zip(of_all, places, expected[:-1], strict=True)):
        assert entry.logprob == pytest.approx(row[token], abs=1e-4)
        assert list(entry.top) == np.argsort(-row)[: 3 if i < len(given) - 1 else 2].tolist()
        assert entry.rank == (row > row[token]).sum()
    (chosen_alone,) = one.generate([given], dataclasses.replace(asked, prompt_logprobs=0))
    assert [entry.logprob for entry in chosen_alone[0].prompt_logprobs[1:]] == pytest.approx(
        [entry.logprob for entry in best[0].prompt_logprobs[1:]], abs=1e-4
    )
    assert not any(entry.top for entry in chosen_alone[0].prompt_logprobs[1:])
    everyone = dataclasses.replace(asked, n=4, best_of=None)
    (four,) = engine().generate([given], everyone)
    mean = {tuple(c.tokens): np.mean([entry.logprob for entry in c.logprobs]) for c in four}
    assert [tuple(c.tokens) for c in best] == sorted(mean, key=mean.get, reverse=True)[:2]


def test_penalties_and_biases_are_those_of_numpy():
    prompt = prompts()[3]
    wanted = SamplingParams(
        max_tokens=12,
        temperature=0.0,
        presence_penalty=0.7,
        frequency_penalty=0.4,
        repetition_penalty=1.3,
        logit_bias={7: 2.5, 9: -100.0},
    )
    one = engine()
    completions = one.generate([prompt, prompts()[0]], wanted)
    text = []
    for _ in range(12):
        row = logits("plain", [*prompt, *text])[-1].astype(np.float64)
        for token in {*prompt, *text}:
            row[token] = row[token] / 1.3 if row[token] > 0 else row[token] * 1.3
        for token in set(text):
            row[token] -= 0.7 + 0.4 * text.count(token)
        row[7] += 2.5
        row[9] -= 100
        text.append(int(row.argmax()))
    assert completions[0][0].tokens == text != slow_greedy("plain", prompt, 12)
    # Those without are not touched by what was written in their slots before.
    assert one.generate([prompt], GREEDY)[0][0].tokens == slow_greedy("plain", prompt, 12)


def test_min_tokens_holds_stop_tokens_off():
    prompt = prompts()[2]
    free = slow_greedy("plain", prompt, 12)
    stop = free[5]
    cut = free.index(stop)
    held = dataclasses.replace(GREEDY, min_tokens=cut + 3)
    ((completion,),) = engine(stop_ids=[stop]).generate([prompt], held)
    assert len(completion.tokens) >= cut + 3
    assert stop not in completion.tokens[: cut + 3]


def test_cancelling_frees_the_pages_and_leaves_the_others_alone():
    one, given = engine(), prompts()
    (gone,), (kept,) = one.add(given[0], GREEDY, "gone"), one.add(given[1], GREEDY, "kept")
    for _ in range(3):
        one.step()
    one.cancel("gone")
    while one.unfinished:
        one.step()
    assert kept.output == slow_greedy("plain", given[1], 12)
    assert gone.finish_reason.value == "cancelled" and len(gone.output) < 12
    assert one._scheduler.memory.held == 0
    one.step()
    assert not one._asked  # nothing is remembered of what has ended


@pytest.mark.parametrize("where", ["begin", "_entry"])
def test_a_request_that_fails_in_a_step_ends_alone(where, monkeypatch):
    one, given = engine(), prompts()
    (good,) = one.add(given[1], GREEDY)
    bad = one.add(given[0], dataclasses.replace(GREEDY, n=2, seed=5))
    (after,) = one.add(given[2], GREEDY)
    whole = getattr(one._runner, where)

    def broken(*arguments):
        if where == "begin" and arguments[1].seed == 5:
            raise RuntimeError("its parameters")
        if where == "_entry" and arguments[0].sequence is bad[0] and arguments[0].number > 2:
            raise RuntimeError("its grammar")
        return whole(*arguments)

    monkeypatch.setattr(one._runner, where, broken)
    news = []
    while one.unfinished:
        news += one.step()
    assert [sample.finish_reason.value for sample in bad] == ["failed"] * 2
    assert {update.sequence for update, _ in news if update.finish_reason == "failed"} == {*bad}
    assert (good.output, after.output) == tuple(slow_greedy("plain", given[i], 12) for i in (1, 2))
    assert one._scheduler.memory.held == 0
    assert one.statistics.failed == 1
    assert one.generate(given[:1], GREEDY)[0][0].tokens == slow_greedy("plain", given[0], 12)


def test_nothing_is_compiled_after_the_warm_up():
    compiled = []

    def listen(name, seconds, **_):
        compiled.append(name) if name == "/jax/core/compile/backend_compile_duration" else None

    one = engine(share="always")
    one.warm_up()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for seed in range(3):
            given = prompts(12, seed)
            asked = greedy_requests(12, seed, most_samples=2)
            asked[::3] = [SamplingParams(max_tokens=7, seed=s, top_p=0.9, min_p=0.01, n=2) for s in range(4)]
            assert len(one.generate(given, asked)) == 12
            one.generate(given[:1], asked[:1])
        assert compiled == []
        assert one.statistics.compilations == 0
        # So many as no other test asks for: this process has not compiled it yet.
        one.generate(given[:1], SamplingParams(max_tokens=1, logit_bias=dict.fromkeys(range(20), 1.0)))
        assert one.statistics.compilations == 1
        assert compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_programs_for_more_do_for_less():
    """After a warm-up for nothing and for everything, no mix of a part of it compiles or changes a text."""
    alone = engine()
    given = prompts(4, 0)
    asked = [
        dataclasses.replace(GREEDY, logprobs=3),
        dataclasses.replace(GREEDY, frequency_penalty=1.0),
        dataclasses.replace(GREEDY, logit_bias={5: 2.0}),
        GREEDY,
    ]
    expected = [alone.generate([prompt], each)[0][0] for prompt, each in zip(given, asked, strict=True)]
    one = engine(max_running=2, token_budget=16)
    everything = SamplingParams(logprobs=20, presence_penalty=1.0, logit_bias={0: 1.0})
    assert one.warm_up((GREEDY, everything)) > 0
    for chosen in ([0, 1, 2, 3], [3], [2, 3], [1], [0]):
        found = one.generate([given[i] for i in chosen], [asked[i] for i in chosen])
        assert [each[0].tokens for each in found] == [expected[i].tokens for i in chosen]
        for i, each in zip(chosen, found, strict=True):
            assert (each[0].logprobs is None) == (i != 0)
            assert i or [len(token.top) for token in each[0].logprobs] == [3] * len(each[0].tokens)
    assert one.statistics.compilations == 0


@pytest.mark.skipif(not memory_maps.used_share(), reason="memory maps are counted on Linux")
def test_programs_make_way_where_memory_maps_run_short(monkeypatch, tmp_path):
    one = engine()
    given = prompts(6, 0)
    expected = [each[0].tokens for each in one.generate(given, dataclasses.replace(GREEDY, logprobs=1))]
    used = memory_maps.used_share() * int(memory_maps._LIMIT.read_text())
    (tmp_path / "limit").write_text(f"{int(used / 0.9)}\n")
    monkeypatch.setattr(memory_maps, "_LIMIT", tmp_path / "limit")
    assert memory_maps.nearly_full()
    programs, full = one._runner._programs, []
    real = programs._compile
    monkeypatch.setattr(programs, "_compile", lambda key: full.append(memory_maps.nearly_full()) or real(key))
    found = one.generate(given, GREEDY)
    assert [each[0].tokens for each in found] == expected
    assert full and not any(full)


def test_a_planned_job_computes_each_shared_prefix_once():
    rng = np.random.default_rng(0)
    shared = [rng.integers(0, 61, 24).tolist() for _ in range(4)]
    given = [tuple(shared[i % 4] + rng.integers(0, 61, 3).tolist()) for i in range(16)]
    asked = [dataclasses.replace(GREEDY, max_tokens=3)] * 16
    cached = {}
    for schedule in ("fifo", "planned"):
        one = engine(schedule=schedule)
        assert_exact("plain", given, asked, one.generate(given, asked))
        cached[schedule] = one.statistics.cached
    assert cached["planned"] == 12 * 24 > cached["fifo"]
    assert one.generate(given[:1], asked[:1])[0][0].tokens == slow_greedy("plain", given[0], 3)  # another job
    assert one.add(given[2], asked[2])[0].request.tokens.tolist() == list(given[2])  # in no job
    assert len(one.generate(given[:1], asked[:1])) == 1  # while another request is unfinished: no plan, no error


def test_the_cache_is_updated_in_place():
    one = engine(cache_tokens=2**16)
    model = Transformer(weights()[0])
    kind = program.Kind(4, None)
    cache = one._runner._state.cache
    memory = one._runner._compile(kind).memory_analysis()
    assert model.config.num_layers == cache.key.shape[0]
    if memory is not None:  # not every backend tells
        assert memory.alias_size_in_bytes >= 2 * cache.key.nbytes
        assert memory.temp_size_in_bytes < cache.key.nbytes  # a copy would be larger
    one.generate(prompts()[:1], GREEDY)
    assert cache.key.is_deleted()


def test_no_prompts():
    assert engine().generate([], GREEDY) == []


@pytest.mark.parametrize(
    ("prompt", "asked", "message"),
    [
        ([], {}, "prompt 1: .*is empty"),
        ([1] * 80, {"max_tokens": 30}, "prompt 1: .*exceed max_length=96"),
        ([61], {}, "61 embeddings"),
        ([-1, 2], {}, "61 embeddings"),
        ([1], {"logit_bias": {61: 1.0}}, "logit_bias: names token 61"),
    ],
)
def test_refuses(prompt, asked, message):
    one = engine()
    with pytest.raises(UserError, match=message):
        one.generate([[1], prompt], [SamplingParams(max_tokens=1), SamplingParams(**asked)])
    assert not one.unfinished


def test_refuses_settings():
    with pytest.raises(UserError, match="max_length=97"):
        engine(max_length=97)
    with pytest.raises(UserError, match="did you mean 'planned'"):
        EngineConfig(schedule="plan")
    with pytest.raises(ValueError, match="best_of=1: must be at least n=2"):
        SamplingParams(n=2, best_of=1)


def test_settings_for_a_job_hold_it():
    settings = EngineConfig.for_job([5, 70, 33], 96, page_size=4)
    assert (settings.max_length, settings.max_running, settings.page_size) == (96, 4, 4)
    assert EngineConfig.for_job([5] * 900, 4096).max_running == EngineConfig.max_running
