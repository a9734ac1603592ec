"""A small ResNet on scikit-learn's handwritten digits, trained with LAMB.

Command:  python scripts/train.py --config=configs/resnet/digits.py --workdir=runs/digits
Hardware: any CPU; no network.
Time:     300 steps of 64 images of 8x8; 20 seconds on two cores.
Expect:   0.99 of the held-out digits (docs/results/cpu/resnet_digits.json).
"""

from ml_collections import ConfigDict

from ml.data import CropConfig, ImageDataConfig
from ml.models import ResNetConfig
from ml.train.base import base


def get_config(arg: str = "") -> ConfigDict:
    """See the module's docstring."""
    del arg
    model = ResNetConfig(
        num_classes=10,
        blocks=(1, 1, 1),
        bottleneck=False,
        width=16,
        channels=1,
        stem="small",
        pixel_mean=(0.3,),
        pixel_std=(0.37,),
    )
    data = ImageDataConfig(source="digits", image_size=8, channels=1, crop=CropConfig(kind="shift", max_shift=1))
    config = base(model, data)

    config.optimizer.name = "lamb"
    config.optimizer.learning_rate = 0.02
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip_norm = 0.0
    config.schedule.kind = "linear"
    config.schedule.warmup_fraction = 0.1

    config.train.steps = 300
    config.train.batch_size = 64
    config.train.remat = "none"
    config.train.label_smoothing = 0.1
    config.eval.every = 100
    config.eval.batches = 8
    config.checkpoint.every = 100
    return config
