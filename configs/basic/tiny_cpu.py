"""A small two-tower model on scikit-learn's digits with captions, trained with exact contrastive batches.

Command:  python scripts/train.py --config=configs/basic/tiny_cpu.py --workdir=runs/basic_tiny
          python scripts/zero_shot.py --model=runs/basic_tiny
Hardware: any CPU; no network.
Time:     400 steps of 256 pairs, 64 embedded at a time; a minute on two cores.
Expect:   a zero-shot accuracy of 0.95 on held-out digits (docs/results/cpu/basic_tiny.json). The loss has a floor:
          digits of one kind share their captions.
"""

from ml_collections import ConfigDict

from ml.data import ImageTextDataConfig, TokenizerConfig
from ml.models import TwoTowerConfig, ViTConfig, text_tower
from ml.train.base import base


def get_config(arg: str = "") -> ConfigDict:
    """See the module's docstring."""
    del arg
    model = TwoTowerConfig(
        image=ViTConfig(
            image_size=8,
            patch_size=2,
            num_layers=2,
            embed_dim=64,
            num_heads=2,
            mlp_dim=128,
            channels=1,
            pixel_mean=(0.3,),
            pixel_std=(0.4,),
        ),
        text=text_tower(vocab_size=512, num_layers=1, embed_dim=64, num_heads=2, max_length=16),
        features=32,
    )
    data = ImageTextDataConfig(
        image_size=8, channels=1, text_length=16, tokenizer=TokenizerConfig(vocab_size=512), heldout_fraction=0.2
    )
    config = base(model, data)

    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 0.002
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip_norm = 1.0
    config.schedule.kind = "cosine"
    config.schedule.warmup_fraction = 0.1

    config.train.steps = 400
    config.train.batch_size = 256
    config.train.microbatches = 4
    config.train.remat = "none"
    config.eval.every = 100
    config.eval.batch_size = 64
    config.checkpoint.every = 200
    return config
