"""BASIC's scale (Pham et al. 2021): two towers of 2.5 billion parameters, exact contrastive batches of 65,536.

The paper's image tower is CoAtNet-7; here it is ViT-G/14, since batch norm would break exactness. As there, the text
tower has 12 layers of width 2,048, weights are cut over the devices and gathered layer by layer, products with weights
are kept for the backward pass and all else is computed again, and the optimizer is AdaFactorW. Rates, decay and steps
are not the paper's, which we do not have: tune them.

Command:  python scripts/preflight.py --config=configs/basic/basic_65k.py --topology=v5p:8x8x8
          python scripts/train.py --config=configs/basic/basic_65k.py --workdir=runs/basic_65k \\
              --config.data.path='pairs/*.tar' --config.data.tokenizer.path=tokenizer.json
Hardware: v5p:8x8x8 (512 chips): see docs/results/preflight_basic_65k_v5p_8x8x8.json.
Time:     not measured.
Expect:   85.7% zero-shot top-1 on ImageNet, by the paper, after 6.6 billion pairs and its other stages; not measured.
"""

from ml_collections import ConfigDict

from ml.data import CropConfig, ImageTextDataConfig, TokenizerConfig
from ml.models import TwoTowerConfig, ViTConfig, text_tower
from ml.train.base import base


def get_config(arg: str = "") -> ConfigDict:
    """See the module's docstring."""
    del arg
    model = TwoTowerConfig(
        image=ViTConfig(image_size=224, patch_size=14, num_layers=48, embed_dim=1664, num_heads=16, mlp_dim=8192),
        text=text_tower(vocab_size=32_768, num_layers=12, embed_dim=2048, num_heads=16, max_length=64),
        features=2048,
    )
    data = ImageTextDataConfig(
        format="webdataset",
        path="pairs/*.tar",
        image_size=224,
        text_length=64,
        crop=CropConfig(kind="resized", min_area=0.9),
        tokenizer=TokenizerConfig(vocab_size=32_768),
        heldout_fraction=0.0001,
    )
    config = base(model, data)

    config.optimizer.name = "adafactorw"
    config.optimizer.learning_rate = 0.001
    config.optimizer.weight_decay = 0.005
    config.optimizer.clip_norm = 1.0
    config.schedule.kind = "linear"
    config.schedule.warmup_steps = 10_000

    config.train.steps = 500_000
    config.train.batch_size = 65_536
    config.train.microbatches = 4
    config.train.remat = "dots_no_batch"
    config.train.loss_chunk = 128
    config.mesh.data = -1
    config.mesh.fsdp = 64
    config.eval.every = 5000
    config.eval.batch_size = 16_384
    config.checkpoint.every = 2500
    return config
