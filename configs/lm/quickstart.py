"""A small Llama-style decoder on the source code of Python's standard library, trained with LAMB.

Command:  make quickstart, or
          python scripts/train.py --config=configs/lm/quickstart.py --workdir=runs/quickstart
Hardware: any CPU; no network.
Time:     2 to 3 minutes on 2 cores.
Expect:   held-out bits per byte well below those of `gzip -9`, and close to those of `xz -9`.
"""

from ml_collections import ConfigDict

from ml.models import TransformerConfig
from ml.train.base import base


def get_config(arg: str = "") -> ConfigDict:
    """See the module's docstring."""
    del arg
    vocab_size = 4096
    config = base(
        TransformerConfig(
            vocab_size=vocab_size,
            num_layers=4,
            embed_dim=256,
            num_heads=8,
            num_kv_heads=4,
            head_dim=32,
            mlp_dim=768,
            max_length=512,
            tie_embeddings=True,
        )
    )
    config.data.tokenizer.vocab_size = vocab_size
    config.data.sequence_length = 256
    config.data.heldout_fraction = 0.02

    config.optimizer.learning_rate = 0.04
    config.optimizer.weight_decay = 0.01
    config.schedule.kind = "linear"
    config.schedule.warmup_fraction = 0.1
    config.schedule.end_factor = 0.02

    config.train.steps = 240
    config.train.batch_size = 16  # 4,096 tokens
    config.train.microbatches = 4
    config.train.loss_chunk = 128
    config.eval.every = 60
    config.eval.batches = 8
    config.checkpoint.every = 60
    return config
