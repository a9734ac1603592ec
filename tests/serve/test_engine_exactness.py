"""The engine's greedy text is that of the whole forward, whatever runs beside it, is cached, shared or preempted."""

import dataclasses

import numpy as np
import pytest
from engine_cases import ARCHITECTURES, assert_exact, engine, greedy_requests, prompts

from ml.serve.sampling import SamplingParams

# Each setting compiles its own handful of programs.
pytestmark = pytest.mark.slow

SETTINGS = {
    "plain": {},
    "shared": {"share": "always"},
    "invariant": {"share": "always", "invariant": True},
    "preempted": {"cache_tokens": 100, "schedule": "prefix"},
    "small_chunks": {"decode_steps": 1, "token_budget": 8},
    "large_pages": {"page_size": 16, "token_budget": 64, "share": "always", "cache_tokens": 160},
    "planned": {"schedule": "planned", "cache_tokens": 240, "page_size": 8, "max_running": 8},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_200_prompts(name, changes):
    given, asked = prompts(200), greedy_requests(200, most_samples=3)
    one = engine(name, **changes)
    assert_exact(name, given, asked, one.generate(given, asked))
    cold = dataclasses.replace(one.statistics)
    # Again, from the cache, alone, and in other company.
    assert_exact(name, given[:3], asked[:3], [one.generate(given[i : i + 1], asked[i : i + 1])[0] for i in range(3)])
    assert_exact(name, given[::-1], asked[::-1], one.generate(given[::-1], asked[::-1]))
    assert one.statistics.cached > 2 * cold.cached > 0
    if changes.get("schedule") == "prefix":
        assert one.statistics.preemptions > 0
    assert one._scheduler.memory.held == 0


def test_sharing_gives_the_samples_of_not_sharing():
    asked = SamplingParams(max_tokens=10, n=5, seed=7)
    (shared,) = engine(share="always").generate([prompts()[0]], asked)
    (alone,) = engine().generate([prompts()[0]], asked)
    assert shared == alone
    assert len({tuple(c.tokens) for c in shared}) > 3


def test_samples_are_distributed_as_the_model_says():
    from engine_cases import logprobs

    prompt = prompts()[5]
    (samples,) = engine().generate([prompt], SamplingParams(max_tokens=1, n=4000, seed=11))
    counts = np.bincount([c.tokens[0] for c in samples], minlength=61)
    expected = 4000 * np.exp(logprobs("plain", prompt)[-1])
    large = expected > 5
    pooled = [(counts[large], expected[large]), (counts[~large].sum(), expected[~large].sum())]
    chi_square = sum(((c - e) ** 2 / e).sum() for c, e in pooled)
    degrees = large.sum()
    assert chi_square < degrees + 5 * np.sqrt(2 * degrees)
