"""Experiments for the tests of planning: small, but with whole tiles, so that nothing is padded."""

import dataclasses
from typing import Any

from ml.config import build, to_dict
from ml.data import DataConfig
from ml.models import TransformerConfig
from ml.optim import OptimizerConfig
from ml.parallel import MeshConfig
from ml.train.config import ExperimentConfig, TrainConfig

MODEL = TransformerConfig(
    vocab_size=1024,
    num_layers=2,
    embed_dim=256,
    num_heads=4,
    num_kv_heads=2,
    head_dim=128,
    mlp_dim=512,
    max_length=256,
)


def experiment(
    model: dict[str, Any] | None = None, mesh: dict[str, Any] | None = None, **train: Any
) -> ExperimentConfig:
    """An experiment with AdamW and sequences of 256."""
    train = {"batch_size": 16, "remat": "full", **train}
    architecture = build(TransformerConfig, to_dict(MODEL) | (model or {}))
    return ExperimentConfig(
        model=architecture,
        data=DataConfig(sequence_length=architecture.max_length),
        optimizer=OptimizerConfig(name="adamw", learning_rate=1e-3, weight_decay=0.1),
        train=dataclasses.replace(TrainConfig(), **train),
        mesh=dataclasses.replace(MeshConfig(), **(mesh or {})),
    )
