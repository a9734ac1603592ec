"""Guessed tokens change no text: the engine with guesses that are right, wrong, and found by n-grams."""

import array
import functools
import itertools

import numpy as np
import pytest
from engine_cases import assert_exact, engine, greedy_requests, logprobs, prompts, slow_greedy, weights

from ml.errors import UserError
from ml.serve.engine import EngineConfig
from ml.serve.runner import Results
from ml.serve.sampling import SamplingParams
from ml.serve.scheduling import NgramDrafter, Request, Row, Sequence, Step

SPECULATE = 3


class Told:
    """Knows texts beforehand, by prompt and sample, and tells each of their tokens rightly with a probability."""

    def __init__(self, texts, right, seed=0):
        self.texts, self.right, self.rng = texts, right, np.random.default_rng(seed)

    def propose(self, sequence, most):
        known = sequence.drawn
        text = self.texts(tuple(sequence.request.tokens), sequence.index)[known : known + most]
        return array.array("i", [t if self.rng.random() < self.right else (t + 1) % 61 for t in text])

    def learn(self, sequence, drafted, accepted):
        pass

    def forget(self, sequence):
        pass


def greedy_text(prompt, index):
    return slow_greedy("plain", prompt, 13)


def drafter(name, texts=greedy_text):
    if name == "n-grams":
        return NgramDrafter(SPECULATE, 2)
    return Told(texts, {"right": 1.0, "wrong": 0.0, "half right": 0.7}[name])


@functools.cache
def warmed():
    """One engine for all tests of its shape, so that few programs are compiled; so tight that sequences lose pages."""
    one = engine(speculate=SPECULATE, cache_tokens=60)
    one.warm_up()
    return one


def guessing(name, texts=greedy_text):
    """That engine with such guesses, and its counts before."""
    one = warmed()
    one._scheduler._speculation.drafter = drafter(name, texts)
    return one, one.statistics.drafted, one.statistics.accepted


@pytest.mark.parametrize("name", ["right", "wrong", "half right", "n-grams"])
def test_greedy_text_is_that_of_the_whole_forward(name):
    """In company, several samples, cold and cached, with pages lost, and alone; and nothing is compiled for it."""
    given, asked = prompts(20), greedy_requests(20, most_samples=2)
    one, drafted, accepted = guessing(name)
    preemptions = one.statistics.preemptions
    for _ in range(2):
        assert_exact("plain", given, asked, one.generate(given, asked))
    for most in range(1, 7):
        alone = [SamplingParams(max_tokens=most, temperature=0.0)]
        assert_exact("plain", given[:1], alone, one.generate(given[:1], alone))
    drafted, accepted = one.statistics.drafted - drafted, one.statistics.accepted - accepted
    assert one.statistics.preemptions > preemptions
    assert one._scheduler.memory.held == 0
    assert one.statistics.compilations == 0
    assert drafted > 10
    right = {"right": accepted == drafted, "wrong": accepted == 0, "half right": 0 < accepted < drafted}
    assert right.get(name, accepted > 0)


def test_right_guesses_save_steps():
    one, _, _ = guessing("right")
    steps, decoded = one.statistics.steps, one.statistics.decoded
    one.generate([(5, 9, 31, 7)], SamplingParams(max_tokens=13, temperature=0.0))
    assert (one.statistics.steps - steps, one.statistics.decoded - decoded) == (4, 13)  # 1 + 4 + 4 + 4


def test_stop_tokens_among_guesses():
    one, _, accepted = guessing("right")
    given = prompts(6)
    for place in range(1, 6):
        stops = [slow_greedy("plain", prompt, 12)[place] for prompt in given]
        asked = [SamplingParams(max_tokens=12, temperature=0.0, stop_token_ids=(stop,)) for stop in stops]
        for prompt, stop, (completion,) in zip(given, stops, one.generate(given, asked), strict=True):
            free = slow_greedy("plain", prompt, 12)
            assert (completion.tokens, completion.finish_reason) == (free[: free.index(stop)], "stop")
    assert one.statistics.accepted > accepted
    assert one._scheduler.memory.held == 0


def test_a_seed_gives_the_text_that_it_gives_without_guesses():
    given = prompts(6)
    asked = [SamplingParams(max_tokens=12, seed=s, top_p=0.9, n=2, temperature=0.8) for s in range(5)]
    asked.append(SamplingParams(max_tokens=12, temperature=1.5))
    one, drafted, _ = guessing("wrong", texts=lambda prompt, index: [])
    plain = one.generate(given, asked)
    assert one.statistics.drafted == drafted
    texts = {(prompt, i): c.tokens for prompt, each in zip(given, plain, strict=True) for i, c in enumerate(each)}
    assert len(set(map(tuple, texts.values()))) == 11
    for name in ("right", "half right", "n-grams"):
        one, drafted, accepted = guessing(name, texts=lambda prompt, index: texts[prompt, index])
        assert one.generate(given, asked) == plain
        if name == "right":
            assert one.statistics.accepted - accepted == one.statistics.drafted - drafted > 20


def test_a_cancelled_request_leaves_the_others_alone():
    one, _, _ = guessing("right")
    asked = SamplingParams(max_tokens=12, temperature=0.0)
    one.add(prompts()[0], asked, "gone")
    (kept,) = one.add(prompts()[1], asked, "kept")
    for _ in range(2):
        one.step()
    one.cancel("gone")
    while one.unfinished:
        one.step()
    assert kept.output == slow_greedy("plain", prompts()[1], 12)
    assert one._scheduler.memory.held == 0


def test_those_that_speculate_share_every_step():
    one, _, _ = guessing("wrong")
    asked = SamplingParams(max_tokens=12, temperature=0.0)
    rows = []
    run = one._runner.run
    one._runner.run = lambda step, allowed: rows.append(len(step.rows)) or run(step, allowed)
    try:
        samples = []
        for prompt in prompts(3):
            samples += one.add([*prompt], asked)
            one.step()
        while one.unfinished:
            one.step()
    finally:
        one._runner.run = run
    assert rows[:4] == [1, 2, 3, 3]
    assert [sample.output for sample in samples] == [slow_greedy("plain", prompt, 12) for prompt in prompts(3)]


@pytest.mark.slow
def test_log_probabilities_of_guesses():
    """And of the prompt, of which some tokens go through the model beside the guesses of another request."""
    one, _, accepted = guessing("right")
    given = prompts()[1:4]
    asked = SamplingParams(max_tokens=11, temperature=0.0, logprobs=2, prompt_logprobs=1)
    results = one.generate(given, asked)
    assert one.statistics.accepted > accepted
    for prompt, (completion,) in zip(given, results, strict=True):
        text = [*prompt, *completion.tokens]
        assert completion.tokens == slow_greedy("plain", prompt, 11)
        entries = [*completion.prompt_logprobs[1:], *completion.logprobs]
        for entry, (_, token), row in zip(entries, itertools.pairwise(text), logprobs("plain", text)[:-1], strict=True):
            assert entry.logprob == pytest.approx(row[token], abs=1e-4)
            assert entry.rank == (row > row[token]).sum()
            assert list(entry.top) == np.argsort(-row)[: len(entry.top)].tolist()


def test_results_row_after_row():
    sequence = Sequence(Request("a", [1, 2], max_tokens=9))

    def row(tokens, samples, drafts):
        return Row(sequence, 0, array.array("i"), 0, array.array("i", tokens), samples, 0, drafts)

    rows = (row([4, 5, 6], 1, 2), row([7], 1, 0), row([8, 9], 0, 0), row([3, 2], 1, 1))
    results = Results(Step(1, rows, (), 1), np.array([[10, 11, 12, 13, 14, 15, 0, 0]]), None, None, [])
    assert results.drawn() == [[10, 11, 12], [13], [], [14, 15]]
    assert [results.place(0, 2), results.place(1, 0), results.place(3, 1)] == [(0, 2), (0, 3), (0, 5)]
    results = Results(Step(1, (row([4], 2, 0), row([], 1, 0)), (), 2), np.array([[10, 11], [12, 13]]), None, None, [])
    assert results.drawn() == [[10, 12], [11]]
    assert [results.place(0, 1), results.place(1, 0)] == [(1, 0), (0, 1)]


def test_refuses_settings():
    for changes in ({"speculate": -1}, {"speculate": 16}, {"speculate_ngram": 0}):
        with pytest.raises(UserError, match=next(iter(changes))):
            engine(**changes)


SWEEPS = {
    "plain": {},
    "shared": {"share": "always", "cache_tokens": 160},
    "invariant": {"share": "always", "invariant": True},
    "large_pages": {"page_size": 16, "token_budget": 64, "share": "always", "cache_tokens": 160, "max_running": 8},
    "planned": {"schedule": "planned", "cache_tokens": 240, "page_size": 8},
    "quantized": {"cache_dtype": "int8"},
}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["plain", "experts"])
@pytest.mark.parametrize("changes", SWEEPS.values(), ids=SWEEPS)
def test_200_prompts(model, changes):
    given, asked = prompts(200), greedy_requests(200, most_samples=3)
    one = engine(model, speculate=5, **changes)
    if "cache_dtype" in changes:  # rounded keys give another text
        texts = dict(zip(given, one.generate(given, SamplingParams(max_tokens=13, temperature=0.0)), strict=True))
        texts = {prompt: completion.tokens for prompt, (completion,) in texts.items()}
    else:
        texts = {prompt: slow_greedy(model, prompt, 13) for prompt in given}
    for right in (0.0, 0.8, 1.0):
        before = one.statistics.accepted
        one._scheduler._speculation.drafter = Told(lambda prompt, index: texts[prompt], right)
        results = one.generate(given, asked)
        assert (one.statistics.accepted > before) == (right > 0)
        if "cache_dtype" not in changes:
            assert_exact(model, given, asked, results)
            continue
        for prompt, each, request in zip(given, results, asked, strict=True):
            assert [c.tokens for c in each] == [texts[prompt][: request.max_tokens]] * request.n
    assert one._scheduler.memory.held == 0


@pytest.mark.slow
def test_company_that_does_not_speculate():
    """Penalties and least lengths beside guesses, biases with them: each gets what it gets without."""
    given = prompts(12)
    kinds = [
        {},
        {"presence_penalty": 1.0, "repetition_penalty": 1.2, "frequency_penalty": 0.5},
        {"min_tokens": 8, "stop_token_ids": tuple(range(20))},
        {"logit_bias": {3: 4.0, 9: -50.0}},
        {"logprobs": 3, "best_of": 3},
        {"prompt_logprobs": 1},
    ]
    asked = [SamplingParams(max_tokens=12, seed=i, temperature=i % 3 / 2, **kinds[i % 6]) for i in range(12)]
    plain = engine().generate(given, asked)
    texts = {prompt: completion.tokens for prompt, (completion,) in zip(given, plain, strict=True)}
    one = engine(speculate=SPECULATE)
    for right in (0.7, 1.0):
        one._scheduler._speculation.drafter = Told(lambda prompt, index: texts[prompt], right)
        together = one.generate(given, asked)
        for expected, completion in zip(plain, together, strict=True):
            assert [c.tokens for c in completion] == [c.tokens for c in expected]
            assert [c.finish_reason for c in completion] == [c.finish_reason for c in expected]
            for mine, other in zip(completion[0].logprobs or (), expected[0].logprobs or (), strict=True):
                assert mine.logprob == pytest.approx(other.logprob, abs=1e-4)
    assert one.statistics.accepted > 20


@pytest.mark.slow
def test_nothing_is_compiled_after_the_warm_up():
    one = engine(speculate=2, share="always", max_running=3)
    some = [SamplingParams(max_tokens=9, temperature=0.0), SamplingParams(max_tokens=7, seed=1, prompt_logprobs=0)]
    one.warm_up(some)
    one._scheduler._speculation.drafter = Told(greedy_text, 0.7)
    for seed in range(3):
        given = prompts(12, seed)
        one.generate(given, [some[i % 2] for i in range(12)])
        one.generate(given[:1], some[0])
    assert one.statistics.accepted > 20
    assert one.statistics.compilations == 0


def test_settings_reach_the_drafter():
    one = engine(speculate=2, speculate_ngram=1)
    assert EngineConfig().speculate == 0
    sequence = one.add([5, 9, 5], SamplingParams(max_tokens=9))[0]
    assert one._scheduler._speculation.drafter.propose(sequence, 9).tolist() == [9, 5]
    assert weights()[0].vocab_size == 61
