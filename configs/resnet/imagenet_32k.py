"""ResNet-50 on ImageNet with LAMB at batch 32,768: 3,519 steps, peak rate 0.04, 20 epochs of warm-up.

Command:  python scripts/train.py --config=configs/resnet/imagenet_32k.py:/data/imagenet --workdir=runs/imagenet_32k
Hardware: 8 devices of 80 GB; more devices: divide train.microbatches by as much. 512 TPU v5p (v5p:8x8x8) with
          train.microbatches=1: see docs/results/preflight_resnet50_32k_v5p_8x8x8.json.
Time:     not measured.
Expect:   a top-1 accuracy of 76.42%, by the paper (You et al. 2020); not measured here.
"""

from ml_collections import ConfigDict

from ml.train.resnet_imagenet import imagenet_experiment


def get_config(arg: str = "") -> ConfigDict:
    """See the module's docstring; ``arg`` is the folder that holds ``train`` and ``val``."""
    return imagenet_experiment(32_768, arg)
