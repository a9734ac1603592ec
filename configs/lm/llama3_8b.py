"""Llama 3.1 8B from scratch, with LAMB at a batch of 4 million tokens.

Command:  python scripts/train.py --config=configs/lm/llama3_8b.py --workdir=runs/llama3_8b \\
              --config.data.sources='[{"kind": "array_record", "path": "gs://.../*.array_record"}]' \\
              --config.data.tokenizer.path=.../tokenizer.json
Hardware: 64 devices of 80 GB or more (parameters and LAMB state: 12 bytes x 8.0e9 = 96 GB, cut 64 ways).
Time:     not measured.
Expect:   not measured; `tests/configs/test_lm.py` checks that the architecture has the 8,030,261,248 parameters.
"""

from ml_collections import ConfigDict

from ml.models import RopeConfig, TransformerConfig
from ml.train.base import base


def get_config(arg: str = "") -> ConfigDict:
    """See the module's docstring."""
    del arg
    config = base(
        TransformerConfig(
            vocab_size=128_256,
            num_layers=32,
            embed_dim=4096,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            mlp_dim=14_336,
            max_length=131_072,
            rope=RopeConfig(theta=500_000.0, scaling="llama3", factor=8.0, original_length=8192),
        )
    )
    config.data.sequence_length = 8192

    config.optimizer.learning_rate = 2.5e-3
    config.optimizer.weight_decay = 0.1
    config.schedule.kind = "cosine"
    config.schedule.warmup_steps = 2000
    config.schedule.end_factor = 0.1

    config.train.steps = 250_000  # 1.05e12 tokens
    config.train.batch_size = 512  # 4,194,304 tokens
    config.train.remat = "full"
    config.train.loss_chunk = 1024
    config.eval.every = 1000
    config.checkpoint.every = 1000
    config.mesh.data, config.mesh.fsdp = 1, -1
    return config
