"""The engine continues prompts as every model family does: as its plain forward here, and as transformers itself."""

import functools
import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ml.models import Transformer
from ml.models.huggingface import load_config, load_params
from ml.serve.engine import Engine, EngineConfig
from ml.serve.sampling import SamplingParams

GOLDEN = Path(__file__).parents[1] / "models" / "golden"
# An encoder writes no text.
NAMES = sorted({path.parent.name for path in GOLDEN.glob("*/logits.npy")} - {"bert"})
NEW = 12


def _prompts():
    """Two share a prefix of 17 tokens."""
    rng = np.random.default_rng(3)
    prefix = rng.integers(0, 96, 17).tolist()
    return [prefix + rng.integers(0, 96, 4).tolist(), prefix + rng.integers(0, 96, 7).tolist(), [5]]


@functools.cache
def _completions(name):
    config = load_config(GOLDEN / name)
    params = load_params(GOLDEN / name, config, dtype=jnp.float32)
    settings = EngineConfig(
        page_size=4,
        max_running=4,
        token_budget=16,
        decode_steps=4,
        share="always",
        max_length=min(48, config.max_length),
    )
    sampling = SamplingParams(max_tokens=NEW, temperature=0.0)
    return config, params, [c.tokens for (c,) in Engine(config, params, settings).generate(_prompts(), sampling)]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_text_is_that_of_the_whole_forward(name):
    config, params, completions = _completions(name)
    forward = jax.jit(lambda p, t: Transformer(config).apply({"params": p}, t, method="forward"))
    for prompt, completion in zip(_prompts(), completions, strict=True):
        tokens = list(prompt)
        for _ in range(NEW):
            padded = np.zeros((1, 36), np.int32)
            padded[0, : len(tokens)] = tokens
            tokens.append(int(forward(params, padded)[0, len(tokens) - 1].argmax()))
        assert completion == tokens[len(prompt) :]


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("name", NAMES)
def test_text_is_that_of_transformers(name, request):
    parity = "parity" in request.config.option.markexpr
    transformers = importlib.import_module("transformers") if parity else pytest.importorskip("transformers")
    torch = importlib.import_module("torch")
    model = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / name, dtype=torch.float32).eval()
    for prompt, completion in zip(_prompts(), _completions(name)[2], strict=True):
        with torch.no_grad():
            out = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW, eos_token_id=None)
        assert completion == out[0, len(prompt) :].tolist()
