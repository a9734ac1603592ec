"""A two-layer BERT on the docstrings and comments of Python's standard library, trained with LAMB.

Command:  python scripts/train.py --config=configs/bert/tiny_cpu.py --workdir=runs/bert_tiny
Hardware: any CPU; no network.
Time:     500 steps of 4,096 tokens; about ten minutes on two busy cores.
Expect:   a held-out accuracy of masked tokens that rises to an eighth, and a next sentence that is still a guess
          (docs/results/cpu/bert_tiny.json): the steps are too few for more.
"""

from ml_collections import ConfigDict

from ml.data import DataConfig, MaskedConfig, SourceConfig, TokenizerConfig
from ml.models import bert_config
from ml.train.base import base


def get_config(arg: str = "") -> ConfigDict:
    """See the module's docstring."""
    del arg
    vocab_size = 2048
    data = DataConfig(
        sources=(SourceConfig(kind="python_prose"),),
        tokenizer=TokenizerConfig(vocab_size=vocab_size),
        sequence_length=128,
        masked=MaskedConfig(max_predictions=20),
    )
    config = base(bert_config(vocab_size=vocab_size, num_layers=2, embed_dim=128, num_heads=2, max_length=128), data)

    config.optimizer.learning_rate = 0.02
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip_norm = 1.0
    config.schedule.kind = "linear"
    config.schedule.warmup_fraction = 0.1

    config.train.steps = 500
    config.train.batch_size = 32
    config.train.remat = "none"
    config.eval.every = 100
    config.eval.batches = 8
    config.checkpoint.every = 100
    return config
