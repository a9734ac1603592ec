"""LAMB's ImageNet experiments as data: ResNet-50 from batch 512 to 32k (You et al. 2020, section 4.3 and its table)."""

import math

from ml_collections import ConfigDict

from ml.data import CropConfig, ImageDataConfig
from ml.models import resnet_config
from ml.train.base import base

# The batch that the table ends with, its learning rate and its epochs of warm-up. The rate falls with the square root
# of the batch; the steps of warm-up stay the same.
LARGEST_BATCH, LARGEST_RATE, LARGEST_WARMUP_EPOCHS = 32_768, 0.04, 20
EPOCHS = 90
IMAGES = 1_281_167
# Images whose batch-norm statistics are shared, where the paper's statistics were those of a TPU core's images.
_GROUP = 32
# Images at a time on each of eight devices.
_ROWS = 256


def imagenet_experiment(batch_size: int, folder: str = "") -> ConfigDict:
    """The recipe for one batch size.

    The paper gives batch, rate, warm-up and epochs. Decay to zero is linear, as in its BERT experiments; label
    smoothing (Szegedy et al. 2016) is what everyone's 90 epochs have; the decay is that of Wightman et al. 2021
    ("ResNet strikes back"), who train the same network with LAMB.

    Args:
      batch_size: images.
      folder: holds ``train`` and ``val``, each a folder for each class; empty: ``imagenet``.
    """
    root = folder or "imagenet"
    data = ImageDataConfig(
        source="folder",
        path=f"{root}/train",
        heldout_path=f"{root}/val",
        image_size=224,
        resize=256,
        channels=3,
        crop=CropConfig(kind="resized", flip=True),
        num_workers=16,
    )
    config = base(resnet_config(50, batch_norm_group=_GROUP), data)
    steps_per_epoch = IMAGES / batch_size

    config.optimizer.name = "lamb"
    config.optimizer.learning_rate = LARGEST_RATE * math.sqrt(batch_size / LARGEST_BATCH)
    config.optimizer.weight_decay = 0.02
    config.optimizer.clip_norm = 0.0
    config.schedule.kind = "linear"
    config.schedule.warmup_steps = round(LARGEST_WARMUP_EPOCHS * IMAGES / LARGEST_BATCH)

    config.train.steps = math.ceil(EPOCHS * steps_per_epoch)
    config.train.batch_size = batch_size
    config.train.microbatches = max(1, batch_size // (8 * _ROWS))
    config.train.remat = "none"
    config.train.label_smoothing = 0.1
    config.eval.every = max(1, round(steps_per_epoch))
    config.eval.batches = 100  # all 50,000 images
    config.checkpoint.every = max(1, round(steps_per_epoch))
    return config
