"""The engine over weights of 8 and 16 bits writes what the plain forward of the same weights would."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_cases import SMALL, greedy_requests, prompts, weights

from ml.models import Transformer
from ml.models.quantization import quantize_params
from ml.serve.engine import Engine
from ml.weights import Int8


@functools.cache
def _forward(config):
    return jax.jit(functools.partial(Transformer(config).apply, method="forward"))


def _regrets(config, params, prompt, completion):
    """By how much the plain forward, in float32, likes its likeliest token better than each one drawn."""
    tokens = np.zeros((1, config.max_length), np.int32)
    text = [*prompt, *completion]
    tokens[0, : len(text)] = text
    logits = np.asarray(_forward(config)({"params": params}, tokens))[0, len(prompt) - 1 : len(text) - 1]
    return logits.max(axis=-1) - logits[np.arange(len(completion)), completion], logits.std()


@pytest.mark.parametrize("name", ["plain", pytest.param("experts", marks=pytest.mark.slow)])
def test_greedy_text_is_that_of_the_same_8_bits(name):
    config, params = weights(name)
    quantized = quantize_params(config, params)
    assert isinstance(quantized["layers"]["attention"]["query"]["kernel"], Int8)
    asked, given = greedy_requests(8), prompts(8)
    completions = Engine(config, quantized, SMALL).generate(given, asked)
    for prompt, request, (completion,) in zip(given, asked, completions, strict=True):
        assert len(completion.tokens) == request.max_tokens
        regrets, _ = _regrets(config, quantized, prompt, completion.tokens)
        np.testing.assert_array_equal(regrets, 0)


def test_greedy_text_in_bfloat16_is_that_of_the_plain_forward_but_for_rounding():
    config, params = weights("plain")
    halves = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    settings = dataclasses.replace(SMALL, dtype=jnp.bfloat16)
    given = prompts(4)
    completions = Engine(config, halves, settings).generate(given, greedy_requests(4))
    for prompt, (completion,) in zip(given, completions, strict=True):
        regrets, spread = _regrets(config, halves, prompt, completion.tokens)
        assert (regrets <= 0.1 * spread).all()
