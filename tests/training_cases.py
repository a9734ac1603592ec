"""Tiny models, ragged batches and tiny experiments, for every test of training."""

import json
import random
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ml.config import build
from ml.models import MoEConfig, TransformerConfig, init_params, module_of
from ml.train.config import ExperimentConfig

LENGTH = 16
_SMALL = {
    "vocab_size": 64,
    "num_layers": 2,
    "embed_dim": 16,
    "num_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 8,
    "mlp_dim": 32,
    "max_length": LENGTH,
}
_GEMMA = {
    "tie_embeddings": True,
    "norm_offset": True,
    "post_norms": True,
    "scale_embedding": True,
    "qk_norm": True,
    "activation": "gelu_tanh",
    "sliding_window": 5,
    "window_pattern": ("local", "global"),
    "local_rope_theta": 100.0,
    "attention_softcap": 20.0,
    "final_softcap": 10.0,
}
_GPT2 = {
    "tie_embeddings": True,
    "position_embedding": "learned",
    "norm": "layer",
    "gated_mlp": False,
    "activation": "gelu_tanh",
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
}
MODELS = {
    "dense": TransformerConfig(**_SMALL),
    "tied": TransformerConfig(**_SMALL, tie_embeddings=True),
    "moe": TransformerConfig(**_SMALL, moe=MoEConfig(num_experts=4, top_k=2, mlp_dim=16, aux_loss_weight=0.1)),
    "gemma": TransformerConfig(**_SMALL, **_GEMMA),
    "gpt2": TransformerConfig(**_SMALL, **_GPT2),
}


def initial_params(config: TransformerConfig, seed: int = 0) -> Any:
    """Random parameters from NumPy, larger than a run begins with, so that every part of the model has its say."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_params(module_of(config), jax.random.key(0)))

    def leaf(path, shape):
        name = path[-1].key
        if name in ("scale", "bias"):
            return (0.1 * rng.normal(size=shape.shape) + (name == "scale")).astype(np.float32)
        return (0.3 * rng.normal(size=shape.shape)).astype(np.float32)

    return jax.tree.map_with_path(leaf, shapes)


def ragged_batch(rows: int, length: int = LENGTH, vocab: int = 64, seed: int = 0) -> dict[str, np.ndarray]:
    """Packed rows ``[rows, length]``: the first are full, later ones ever emptier, each of several documents."""
    rng = np.random.default_rng(seed)
    names = ("tokens", "targets", "segment_ids", "positions")
    batch = {name: np.zeros((rows, length), np.int32) for name in names}
    batch["loss_mask"] = np.zeros((rows, length), np.float32)
    for row in range(rows):
        filled = max(2, length * (rows - row) // rows)
        start, document = 0, 0
        while start < filled:
            size = min(int(rng.integers(2, length // 2)), filled - start)
            document += 1
            tokens = rng.integers(1, vocab, size)
            part = np.s_[row, start : start + size]
            batch["tokens"][part] = tokens
            batch["targets"][part] = [*tokens[1:], 0]
            batch["segment_ids"][part] = document
            batch["positions"][part] = np.arange(size)
            batch["loss_mask"][part] = [1] * (size - 1) + [0]
            start += size
    return batch


def write_corpus(path: Path, documents: int = 120) -> Path:
    """A JSONL file of short texts."""
    words = ["alpha", "beta", "gamma", "delta", "for", "x", "in", "range", "print"]
    choose = random.Random(0)
    texts = (" ".join(choose.choices(words, k=choose.randint(3, 60))) for _ in range(documents))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


CONFIG_FILE = """
from ml.models import TransformerConfig
from ml.train.base import base


def get_config(arg=""):
    config = base(
        TransformerConfig(
            vocab_size=320, num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=16,
            max_length=32, tie_embeddings=True,
        )
    )
    config.data.tokenizer.vocab_size = 300
    config.data.sequence_length = 32
    config.data.sources = [{"kind": "jsonl", "path": "CORPUS"}]
    config.data.heldout_fraction = 0.1
    config.optimizer.learning_rate = 0.02
    config.train.steps = 4
    config.train.batch_size = 8
    config.train.microbatches = 2
    config.eval.batches = 2
    config.checkpoint.every = 2
    return config
"""


def write_config(folder: Path) -> Path:
    """A config file for `scripts/train.py`, and its corpus beside it."""
    corpus = write_corpus(folder / "corpus.jsonl")
    path = folder / "tiny.py"
    path.write_text(CONFIG_FILE.replace("CORPUS", str(corpus)))
    return path


def experiment(corpus: Path, **changes: object) -> ExperimentConfig:
    """The same experiment as a dataclass; ``changes`` are dotted keys, with ``__`` for the dot."""
    names: dict[str, object] = {}
    exec(CONFIG_FILE.replace("CORPUS", str(corpus)), names)
    config = names["get_config"]()  # type: ignore[operator]
    with config.unlocked(), config.ignore_type():
        for name, value in changes.items():
            *groups, key = name.split("__")
            group = config
            for one in groups:
                group = group[one]
            group[key] = value
    return build(ExperimentConfig, config.to_dict())
