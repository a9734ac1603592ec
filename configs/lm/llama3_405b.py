"""Llama 3.1 405B from scratch, with LAMB at a batch of 25 million tokens.

Command:  python scripts/train.py --config=configs/lm/llama3_405b.py --workdir=runs/llama3_405b \\
              --config.data.sources='[{"kind": "array_record", "path": "gs://.../*.array_record"}]' \\
              --config.data.tokenizer.path=.../tokenizer.json
Hardware: a multiple of 2048 devices of 80 GB or more (parameters and LAMB state: 12 bytes x 4.06e11 = 4.87 TB, cut 2048
          ways), such as TPU v5p 16x16x24: see docs/results/preflight_llama3_405b_v5p_16x16x24.json.
Time:     not measured.
Expect:   not measured; `tests/configs/test_lm.py` checks that the architecture has the 405,853,388,800 parameters.
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
            num_layers=126,
            embed_dim=16_384,
            num_heads=128,
            num_kv_heads=8,
            head_dim=128,
            mlp_dim=53_248,
            max_length=131_072,
            rope=RopeConfig(theta=500_000.0, scaling="llama3", factor=8.0, original_length=8192),
        )
    )
    config.data.sequence_length = 8192

    config.optimizer.learning_rate = 5e-3
    config.optimizer.weight_decay = 0.1
    config.schedule.kind = "cosine"
    config.schedule.warmup_steps = 2000
    config.schedule.end_factor = 0.1

    config.train.steps = 100_000  # 2.5e12 tokens
    config.train.batch_size = 3072  # 25,165,824 tokens
    config.train.microbatches = 4
    config.train.remat = "full"
    config.train.loss_chunk = 1024
    config.eval.every = 1000
    config.checkpoint.every = 500
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = -1, 256, 8
    return config
