"""What a residual network costs: parameters, FLOPs and activation memory, from its configuration alone."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp

from ml.models.cost import ActivationMemory, ParameterCount
from ml.models.resnet import STEMS
from ml.models.resnet_config import ResNetConfig


class Convolution(NamedTuple):
    """A convolution before its batch norm; ``size`` is the side of its result, ``block`` the number of its block."""

    inputs: int
    features: int
    window: int
    size: int
    block: int

    @property
    def multiplications(self) -> int:
        """For one image."""
        return self.inputs * self.features * (self.window * self.size) ** 2

    @property
    def outputs(self) -> int:
        """Numbers in the result for one image."""
        return self.features * self.size**2


def convolutions(config: ResNetConfig, image_size: int) -> Iterator[Convolution]:
    """All of them, in order; the stem is of block -1."""
    c = config
    window, stride = STEMS[c.stem]
    size = _shrunk(image_size, stride)
    yield Convolution(c.channels, c.width, window, size, -1)
    size = _shrunk(size, 2) if c.stem == "imagenet" else size
    channels, block = c.width, 0
    for stage, count in enumerate(c.blocks):
        width = c.width * 2**stage
        out = 4 * width if c.bottleneck else width
        for number in range(count):
            inside, size = size, _shrunk(size, 2 if stage > 0 and number == 0 else 1)
            if c.bottleneck:
                yield Convolution(channels, width, 1, inside, block)
                yield Convolution(width, width, 3, size, block)
                yield Convolution(width, out, 1, size, block)
            else:
                yield Convolution(channels, width, 3, size, block)
                yield Convolution(width, width, 3, size, block)
            if channels != out or inside != size:
                yield Convolution(channels, out, 1, size, block)
            channels, block = out, block + 1


def parameter_count(config: ResNetConfig) -> ParameterCount:
    """Counts the parameters that `ml.models.init_params` would make."""
    layers = list(convolutions(config, 32))
    total = sum(layer.inputs * layer.features * layer.window**2 + 2 * layer.features for layer in layers)
    total += (_head_inputs(config) + 1) * config.num_classes
    return ParameterCount(total, total, 0)


def forward_flops(config: ResNetConfig, image_size: int) -> float:
    """FLOPs of convolutions and classifier for one image, a multiplication and an addition counted as two."""
    layers = sum(layer.multiplications for layer in convolutions(config, image_size))
    return 2.0 * (layers + _head_inputs(config) * config.num_classes)


def activation_memory(
    config: ResNetConfig, *, rows: int, image_size: int, remat: str = "none", dtype: Any = jnp.float32
) -> ActivationMemory:
    """Predicts the bytes of activations of one microbatch on one device: an estimate to plan with.

    Without remat the backward pass reads each convolution's input and result (for batch norm), with ``dots`` the result
    alone; with ``full`` each block's input, and a block's own while it is in hand.

    Args:
      config: the architecture.
      rows: images on the device.
      image_size: their side.
      remat: key of `ml.models.resnet.REMAT_POLICIES`.
      dtype: of activations.
    """
    layers = list(convolutions(config, image_size))
    size = rows * jnp.dtype(dtype).itemsize
    of_block = [
        2 * size * sum(layer.outputs for layer in layers if layer.block == block)
        for block in range(-1, sum(config.blocks))
    ]
    if remat != "full":
        return ActivationMemory(sum(of_block) // (1 if remat == "none" else 2), max(of_block), 0)
    ends = [next(layer for layer in reversed(layers) if layer.block == block) for block in range(sum(config.blocks))]
    return ActivationMemory(of_block[0] + size * sum(end.outputs for end in ends), max(of_block), 0)


def _head_inputs(config: ResNetConfig) -> int:
    return config.width * 2 ** (len(config.blocks) - 1) * (4 if config.bottleneck else 1)


def _shrunk(size: int, stride: int) -> int:
    """The side behind a convolution or pooling with an odd window, padded by its half."""
    return (size - 1) // stride + 1
