"""Mixtral 8x7B from scratch (8 experts, 2 a token, dropless), with LAMB at a batch of 4 million tokens.

Command:  python scripts/train.py --config=configs/lm/mixtral_8x7b.py --workdir=runs/mixtral_8x7b \\
              --config.data.sources='[{"kind": "array_record", "path": "gs://.../*.array_record"}]' \\
              --config.data.tokenizer.path=.../tokenizer.json
Hardware: 128 devices of 80 GB or more (parameters and LAMB state: 12 bytes x 4.7e10 = 560 GB, cut over all of them).
Time:     not measured.
Expect:   not measured; `tests/configs/test_lm.py` checks that the architecture has the 46,702,792,704 parameters.
"""

from ml_collections import ConfigDict

from ml.models import MoEConfig, RopeConfig, TransformerConfig
from ml.train.base import base


def get_config(arg: str = "") -> ConfigDict:
    """See the module's docstring."""
    del arg
    config = base(
        TransformerConfig(
            vocab_size=32_000,
            num_layers=32,
            embed_dim=4096,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            mlp_dim=14_336,
            max_length=32_768,
            rope=RopeConfig(theta=1_000_000.0),
            moe=MoEConfig(num_experts=8, top_k=2, mlp_dim=14_336, aux_loss_weight=0.02),
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
