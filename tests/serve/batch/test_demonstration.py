"""The first batch of a fresh model."""

import json
import re

import jax
import pytest
import scripted_engine

from ml.checkpoint.pretrained import save_workdir
from ml.data.tokenizer import Tokenizer
from ml.models import Transformer, TransformerConfig, init_params
from ml.serve.batch import demonstration

CONFIG = TransformerConfig(
    vocab_size=300, num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=24, max_length=1024
)


@pytest.fixture
def folder(tmp_path):
    Tokenizer.train(["def pop(self):\n        return self " * 20], 300).save(tmp_path / "tokenizer")
    params = init_params(Transformer(CONFIG), jax.random.key(0))
    save_workdir(tmp_path / "run", CONFIG, params, tmp_path / "tokenizer" / "tokenizer.json")
    return tmp_path / "run"


def _check(folder, most_computed, runs):
    for _ in range(runs):  # as `make quickstart` does when it is run again
        line = demonstration.answer_shared_prefix(folder, samples=2)
        found = re.search(r"of ([\d,]+) prompt tokens ([\d,]+)", line)
        prompt, cached = (int(number.replace(",", "")) for number in found.groups())
        records = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
        assert len(records) == 12
        assert all(len(record["response"]["body"]["choices"]) == 2 for record in records)
        assert prompt == 2 * sum(record["response"]["body"]["usage"]["prompt_tokens"] for record in records)
        assert prompt - cached <= most_computed * prompt


def test_says_what_was_shared(folder, monkeypatch):
    monkeypatch.setattr(scripted_engine.ScriptedEngine, "most_prompt", 2000)
    monkeypatch.setattr(demonstration, "Engine", scripted_engine.SlowEngine)
    _check(folder, most_computed=1, runs=2)


@pytest.mark.slow
def test_most_of_the_prompts_is_computed_once(folder):
    _check(folder, most_computed=0.15, runs=1)
