"""ResNet-50 on ImageNet with LAMB at batch 512: 225,206 steps, peak rate 0.005, 0.3125 epochs of warm-up.

Command:  python scripts/train.py --config=configs/resnet/imagenet_512.py:/data/imagenet --workdir=runs/imagenet_512
Hardware: 8 devices of 80 GB; more devices: divide train.microbatches by as much.
Time:     not measured.
Expect:   a top-1 accuracy of 76.96%, by the paper (You et al. 2020); not measured here.
"""

from ml_collections import ConfigDict

from ml.train.resnet_imagenet import imagenet_experiment


def get_config(arg: str = "") -> ConfigDict:
    """See the module's docstring; ``arg`` is the folder that holds ``train`` and ``val``."""
    return imagenet_experiment(512, arg)
