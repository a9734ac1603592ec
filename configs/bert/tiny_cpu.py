"""A two-layer BERT on the docstrings and comments of Python's standard library, in two stages as in the paper.

Command:  python scripts/train.py --config=configs/bert/tiny_cpu.py --workdir=runs/bert_tiny_64
          python scripts/train.py --config=configs/bert/tiny_cpu.py:runs/bert_tiny_64 --workdir=runs/bert_tiny
Hardware: any CPU; no network.
Time:     4,500 steps of 2,048 tokens and 400 of 4,096: 20 and 4 minutes on two busy cores.
Expect:   a held-out accuracy of masked tokens that rises from 0.12 to 0.28, and a next sentence that is told in two of
          three pairs (docs/results/cpu/bert_tiny_64.json); on the longer rows of the second stage 0.23
          (docs/results/cpu/bert_tiny.json).
"""

from ml_collections import ConfigDict

from ml.models import bert_config
from ml.train.lamb_bert import Stage, stage_experiment


def get_config(arg: str = "") -> ConfigDict:
    """See the module's docstring; ``arg`` is the work directory of the first stage, and means the second."""
    # A vocabulary whose tokens are nearly words: those tell texts apart. From the usual deviation of 0.02, products of
    # so narrow a model begin so small that attention stays even for a long time.
    model = bert_config(vocab_size=8192, num_layers=2, embed_dim=128, num_heads=2, max_length=128, init_stddev=0.05)
    config = stage_experiment(model, (Stage(32, 64, 4500, 2e-3, 225), Stage(32, 128, 400, 5e-4, 40)), arg)
    config.data.masked.mask_fraction = 0.3  # twice BERT's: more to learn from a token that is computed

    config.optimizer.name = "adamw"  # the batch is far from large
    config.train.dropout = 0.0
    config.train.microbatches = 1
    config.train.remat = "none"
    config.eval.every = config.train.steps // 10
    config.eval.batches = 8
    config.checkpoint.every = config.train.steps // 10
    return config
