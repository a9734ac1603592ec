"""GPT-2 124M from scratch (Radford et al. 2019), with LAMB at a batch of 1 million tokens.

Command:  python scripts/train.py --config=configs/lm/gpt2_124m.py --workdir=runs/gpt2 \\
              --config.data.sources='[{"kind": "parquet", "path": ".../*.parquet"}]' \\
              --config.data.tokenizer.path=.../tokenizer.json
Hardware: one GPU of 24 GB or more, or any number of devices that divides the batch.
Time:     not measured.
Expect:   not measured; `tests/configs/test_lm.py` checks that the architecture has GPT-2's 124,439,808 parameters.
"""

from ml_collections import ConfigDict

from ml.models import TransformerConfig
from ml.train.base import base


def get_config(arg: str = "") -> ConfigDict:
    """See the module's docstring."""
    del arg
    config = base(
        TransformerConfig(
            vocab_size=50_257,
            num_layers=12,
            embed_dim=768,
            num_heads=12,
            num_kv_heads=12,
            head_dim=64,
            mlp_dim=3072,
            max_length=1024,
            activation="gelu_tanh",
            gated_mlp=False,
            norm="layer",
            position_embedding="learned",
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
            tie_embeddings=True,
        )
    )
    config.optimizer.learning_rate = 5e-3
    config.optimizer.weight_decay = 0.1
    config.schedule.kind = "cosine"
    config.schedule.warmup_steps = 500
    config.schedule.end_factor = 0.1

    config.train.steps = 10_000  # 1.05e10 tokens
    config.train.batch_size = 1024  # 1,048,576 tokens
    config.train.microbatches = 32
    config.train.loss_chunk = 256
    config.eval.every = 250
    config.checkpoint.every = 500
    return config
