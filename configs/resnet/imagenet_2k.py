"""ResNet-50 on ImageNet with LAMB at batch 2,048: 56,302 steps, peak rate 0.01, 1.25 epochs of warm-up.

Command:  python scripts/train.py --config=configs/resnet/imagenet_2k.py:/data/imagenet --workdir=runs/imagenet_2k
Hardware: 8 devices of 80 GB; more devices: divide train.microbatches by as much.
Time:     not measured.
Expect:   a top-1 accuracy between the paper's 76.96% at 512 and 76.42% at 32k (You et al. 2020); not measured here.
"""

from ml_collections import ConfigDict

from ml.train.resnet_imagenet import imagenet_experiment


def get_config(arg: str = "") -> ConfigDict:
    """See the module's docstring; ``arg`` is the folder that holds ``train`` and ``val``."""
    return imagenet_experiment(2_048, arg)
