"""Small models with lively text, the engine in small shapes, and the plain forward that it must agree with."""

import dataclasses
import functools

import jax
import numpy as np

from ml.models import MoEConfig, Transformer, TransformerConfig, init_params
from ml.serve.engine import Engine, EngineConfig
from ml.serve.sampling import SamplingParams

CONFIG = TransformerConfig(
    vocab_size=61,
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,  # what the kernel for CPUs takes
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
# One small shape for all tests, so that few programs are compiled; engines of the same shape share them. The cache has
# room for one longest sequence, so that many at once lose their pages.
SMALL = EngineConfig(page_size=4, max_running=4, token_budget=16, decode_steps=4, share="never", cache_tokens=96)


@functools.cache
def weights(name="plain"):
    """A model's architecture and parameters."""
    config = dataclasses.replace(CONFIG, **ARCHITECTURES[name])
    return config, jax.jit(init_params, static_argnums=0)(Transformer(config), jax.random.key(5))


def engine(name="plain", stop_ids=(), **changes):
    """An engine of the small shape but for ``changes``."""
    return Engine(*weights(name), dataclasses.replace(SMALL, **changes), stop_ids=stop_ids)


@functools.cache
def _forward(name):
    return jax.jit(functools.partial(Transformer(weights(name)[0]).apply, method="forward"))


def logits(name, tokens):
    """Of every token, without cache, batch, or padding that anything could see."""
    config, params = weights(name)
    padded = np.zeros((1, config.max_length), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(_forward(name)({"params": params}, padded)[0, : len(tokens)])


def logprobs(name, tokens):
    """Likewise, log-probabilities."""
    raw = logits(name, tokens).astype(np.float64)
    return raw - np.log(np.exp(raw).sum(axis=-1, keepdims=True))


def slow_greedy(name, prompt, max_tokens):
    """The whole sequence again for every token."""
    return list(_slow_greedy(name, tuple(prompt), max_tokens))


@functools.cache
def _slow_greedy(name, prompt, max_tokens):
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(int(logits(name, tokens)[-1].argmax()))
    return tuple(tokens[len(prompt) :])


def prompts(count=24, seed=0):
    """Prompts of 1 to 40 tokens; most begin as one of three prefixes do."""
    rng = np.random.default_rng(seed)
    prefixes = [rng.integers(0, 61, n).tolist() for n in (0, 9, 21)]
    return [tuple(prefixes[rng.integers(3)] + rng.integers(0, 61, rng.integers(1, 20)).tolist()) for _ in range(count)]


def greedy_requests(count, seed=1, most_samples=1):
    """Greedy requests of 1 to 13 tokens."""
    rng = np.random.default_rng(seed)
    lengths, samples = rng.integers(1, 14, count), rng.integers(1, most_samples + 1, count)
    return [SamplingParams(max_tokens=int(m), n=int(n), temperature=0.0) for m, n in zip(lengths, samples, strict=True)]


def assert_exact(name, given, asked, completions):
    """That greedy completions are the plain forward's, all samples of them."""
    for prompt, request, samples in zip(given, asked, completions, strict=True):
        assert len(samples) == request.n
        for completion in samples:
            assert len(completion.tokens) == request.max_tokens and completion.finish_reason == "length"
            if completion.tokens != slow_greedy(name, prompt, 13)[: request.max_tokens]:
                assert_greedy_but_for_ties(name, prompt, completion.tokens)


def assert_greedy_but_for_ties(name, prompt, tokens):
    """That every token has the largest logit of the plain forward, or lacks no more of it than rounding takes."""
    of_each = logits(name, [*prompt, *tokens])[len(prompt) - 1 : -1]
    lacking = of_each.max(axis=-1) - of_each[np.arange(len(tokens)), list(tokens)]
    assert lacking.max() <= 2e-6 * np.abs(of_each).max(), lacking
