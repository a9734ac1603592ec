"""The architecture of a residual network, as data."""

import dataclasses
from typing import Any, Literal

# Blocks of each stage, and whether they are bottlenecks (He et al. 2015, table 1).
_DEPTHS: dict[int, tuple[tuple[int, ...], bool]] = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
}


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """A residual network for images (He et al. 2015) in the form called v1.5; `resnet_config` knows the usual depths.

    Attributes:
      num_classes: outputs.
      blocks: residual blocks of each stage; every stage but the first halves the image and doubles the channels.
      bottleneck: blocks of 1x1, 3x3 and 1x1 convolutions, with four times ``width`` channels between blocks, rather
        than of two 3x3.
      width: channels of the stem and of the first stage.
      channels: of an image: 1 (grey) or 3.
      stem: ``imagenet``: a 7x7 convolution and a pooling, each of stride 2; ``small``: one 3x3 convolution, for images
        of a few dozen pixels.
      zero_init: the last scale of each block starts at zero, so that the block starts as the identity (Goyal et al.
        2017, section 5.1).
      batch_norm_group: how many rows of a microbatch share batch-norm statistics. 0: all, whichever replicas hold them;
        n: each n rows that follow one another, which lie on one replica, so that nothing crosses the network.
      batch_norm_momentum: how much of the running statistics is kept in a step.
      batch_norm_eps: added to the variance.
      pixel_mean, pixel_std: of the channels of images in [0, 1]; one number for all channels or one for each.
      kind: tells this architecture from others.
    """

    num_classes: int = 1000
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    bottleneck: bool = True
    width: int = 64
    channels: int = 3
    stem: Literal["imagenet", "small"] = "imagenet"
    zero_init: bool = True
    batch_norm_group: int = 0
    batch_norm_momentum: float = 0.9
    batch_norm_eps: float = 1e-5
    pixel_mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    pixel_std: tuple[float, ...] = (0.229, 0.224, 0.225)
    kind: Literal["resnet"] = "resnet"

    def __post_init__(self):
        for name in ("num_classes", "width", "channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.blocks or min(self.blocks) < 1:
            raise ValueError(f"blocks={list(self.blocks)}: each stage needs a block")
        if self.batch_norm_group < 0 or not 0 <= self.batch_norm_momentum < 1:
            raise ValueError(
                f"need batch_norm_group={self.batch_norm_group} >= 0 and batch_norm_momentum="
                f"{self.batch_norm_momentum} in [0, 1)"
            )
        for name in ("pixel_mean", "pixel_std"):
            if len(getattr(self, name)) not in (1, self.channels):
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for channels={self.channels}")
        if min(self.pixel_std) <= 0:
            raise ValueError(f"pixel_std={list(self.pixel_std)} must be positive")


def resnet_config(depth: int = 50, **more: Any) -> ResNetConfig:
    """The architecture of ResNet-18, 34, 50 or 101.

    Args:
      depth: one of those.
      more: other fields of `ResNetConfig`.

    Raises:
      ValueError: another depth.
    """
    if depth not in _DEPTHS:
        raise ValueError(f"depth={depth} is not one of {', '.join(map(str, _DEPTHS))}; set blocks for another")
    blocks, bottleneck = _DEPTHS[depth]
    return ResNetConfig(**{"blocks": blocks, "bottleneck": bottleneck, **more})
