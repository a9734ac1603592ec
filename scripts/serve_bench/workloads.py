"""Jobs for a serving engine: prompts of random tokens, with and without what they share."""

import dataclasses

import numpy as np

# The model that is measured with: 8 layers of 512, as `ml.models.TransformerConfig` has its fields.
ARCHITECTURE = {
    "vocab_size": 32_000,
    "num_layers": 8,
    "embed_dim": 512,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 64,
    "mlp_dim": 1536,
    "max_length": 1024,
}


@dataclasses.dataclass(frozen=True)
class Job:
    """Prompts, and how many tokens to write behind each.

    Attributes:
      prompts: token ids.
      new_tokens: to each, no fewer and no more.
      prefix: tokens that all prompts begin with.
    """

    prompts: list[list[int]]
    new_tokens: int
    prefix: int = 0


def shared(requests: int) -> Job:
    """All prompts are 512 common tokens and 32 of their own."""
    rng = np.random.default_rng(0)
    prefix, own = _tokens(rng, 512), [_tokens(rng, 32) for _ in range(requests)]
    return Job([prefix + each for each in own], 64, prefix=512)


def unshared(requests: int) -> Job:
    """Prompts of 32 to 512 tokens that share nothing."""
    rng = np.random.default_rng(1)
    return Job([_tokens(rng, length) for length in rng.integers(32, 513, requests).tolist()], 64)


def two_level(requests: int) -> Job:
    """Groups of 32 share 256 tokens, groups of 8 of these 128 more; in random order, as a job's lines often are."""
    rng = np.random.default_rng(2)
    prompts: list[list[int]] = []
    for i in range(requests):
        if i % 32 == 0:
            outer = _tokens(rng, 256)
        if i % 8 == 0:
            inner = _tokens(rng, 128)
        prompts.append(outer + inner + _tokens(rng, 16))
    return Job([prompts[i] for i in rng.permutation(requests)], 16)


JOBS = {"shared": shared, "unshared": unshared, "two_level": two_level}


def _tokens(rng: np.random.Generator, count: int) -> list[int]:
    return rng.integers(0, ARCHITECTURE["vocab_size"], count).tolist()
