"""Residual networks (He et al. 2015), v1.5: the 3x3 convolution of a bottleneck has the stride (Goyal et al. 2017).

Convolutions compute in the type of activations, batch norm in float32. In training the collection ``batch_stats`` is
what a batch's statistics *were*; how they become running ones is the training's affair (`ml.train.image_loss`). Padding
is symmetric, as in torchvision, whose weights fit.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from ml.models.parameters import Placement, unplaced, weight
from ml.models.resnet_config import ResNetConfig
from ml.models.two_tower_config import ViTConfig
from ml.weights import dot, materialize

# Standard deviation of the classifier's initial weights (Goyal et al. 2017, section 5.1).
_HEAD_STDDEV = 0.01
# Window and stride of the first convolution; the larger one is followed by a pooling.
STEMS = {"imagenet": (7, 2), "small": (3, 1)}
_KERNEL_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # He et al. 2015b, as torchvision has it
# By name as a transformer's: nothing is done again, all but the convolutions, everything within a block.
REMAT_POLICIES: Mapping[str, Callable[..., Any] | None] = {
    "none": None,
    "dots": lambda primitive, *_, **__: primitive.name == "conv_general_dilated",
    "dots_no_batch": lambda primitive, *_, **__: primitive.name == "conv_general_dilated",
    "full": jax.checkpoint_policies.nothing_saveable,
}
_KERNEL_AXES = ("window", "window", "channels", "channels")


class Conv(nn.Module):
    """A convolution without bias: batch norm follows, and would take it away."""

    features: int
    window: int = 1
    stride: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch h w features"]:
        """Convolves in ``x``'s dtype; the image shrinks by the stride alone."""
        shape = (self.window, self.window, x.shape[-1], self.features)
        return convolve(self.stride, x, materialize(weight(self, "kernel", _KERNEL_INIT, shape, _KERNEL_AXES)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def convolve(
    stride: int,
    x: Float[Array, "batch height width channels"],
    kernel: Float[Array, "window window channels features"],
) -> Float[Array, "batch h w features"]:
    """A convolution in ``x``'s dtype whose kernel has a float32 gradient, also where ``x`` is bfloat16.

    The gradient is a sum over all rows, so over replicas: it must not be rounded before it has crossed the network.

    Args:
      stride: in both directions.
      x: padded by half a window on each side.
      kernel: float32, of an odd window.
    """
    return _convolution(stride, x, kernel)


def _convolution(stride: int, x: Array, kernel: Array) -> Array:
    half = kernel.shape[0] // 2
    return jax.lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        window_strides=(stride, stride),
        padding=[(half, half)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _convolve_forward(stride, x, kernel):
    return _convolution(stride, x, kernel), (x, kernel)


def _convolve_backward(stride, kept, cotangent):
    x, kernel = kept
    (of_x,) = jax.vjp(lambda x: _convolution(stride, x, kernel), x)[1](cotangent)
    window, half = kernel.shape[0], kernel.shape[0] // 2
    # Correlates images with cotangents: rows are summed over, channels are told apart.
    sizes = zip(x.shape[1:3], cotangent.shape[1:3], strict=True)
    padding = [(half, window + (to - 1) * stride - size - half) for size, to in sizes]
    of_kernel = jax.lax.conv_general_dilated(
        x,
        cotangent,
        window_strides=(1, 1),
        padding=padding,
        rhs_dilation=(stride, stride),
        dimension_numbers=("CHWN", "IHWO", "HWNC"),
        preferred_element_type=jnp.float32,
    )
    return of_x, of_kernel.astype(kernel.dtype)


convolve.defvjp(_convolve_forward, _convolve_backward)


class BatchNorm(nn.Module):
    """Batch norm (Ioffe & Szegedy 2015) over groups of rows, or by running statistics.

    Variances are biased, the running ones too, as in the papers' code (torch's running ones are not).
    """

    config: ResNetConfig
    zero: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "batch ... channels"], train: bool) -> Float[Array, "batch ... channels"]:
        """Normalizes; ``train``: by the statistics of ``x``, whose means over groups go into ``batch_stats``."""
        shape = (x.shape[-1],)
        initializer = nn.initializers.zeros if self.zero else nn.initializers.ones
        scale = materialize(weight(self, "scale", initializer, shape, ("norm",))).astype(jnp.float32)
        bias = materialize(weight(self, "bias", nn.initializers.zeros, shape, ("norm",))).astype(jnp.float32)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        y = x.astype(jnp.float32)
        if train and not self.is_initializing():
            rows = self.config.batch_norm_group or x.shape[0]
            groups = y.reshape(-1, rows, *x.shape[1:])
            within = tuple(range(1, groups.ndim - 1))
            # One pass over the activations and one sum over the replicas for both.
            means, squares = (groups.mean(within, keepdims=True), jnp.square(groups).mean(within, keepdims=True))
            variances = jnp.maximum(squares - jnp.square(means), 0)
            mean.value, var.value = means.mean(0).reshape(shape), variances.mean(0).reshape(shape)
            y = (groups - means) * jax.lax.rsqrt(variances + self.config.batch_norm_eps)
            y = y.reshape(x.shape)
        else:
            y = (y - mean.value) * jax.lax.rsqrt(var.value + self.config.batch_norm_eps)
        return (y * scale + bias).astype(x.dtype)


class Block(nn.Module):
    """A residual block, plain or a bottleneck."""

    config: ResNetConfig
    width: int
    stride: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"], train: bool) -> Float[Array, "batch h w out"]:
        """Adds what the convolutions find to the image, projected where the shapes differ."""
        norm = functools.partial(BatchNorm, self.config)
        if self.config.bottleneck:
            convolutions = [(self.width, 1, 1), (self.width, 3, self.stride), (4 * self.width, 1, 1)]
        else:
            convolutions = [(self.width, 3, self.stride), (self.width, 3, 1)]
        y = x
        for number, convolution in enumerate(convolutions, 1):
            last = number == len(convolutions)
            y = Conv(*convolution, name=f"conv{number}")(y)
            y = norm(zero=last and self.config.zero_init, name=f"norm{number}")(y, train)
            y = y if last else jax.nn.relu(y)
        if x.shape != y.shape:
            x = Conv(y.shape[-1], 1, self.stride, name="projection")(x)
            x = norm(name="projection_norm")(x, train)
        return jax.nn.relu(x + y)


class ResNet(nn.Module):
    """A residual network, from pixels to logits.

    Attributes:
      config: the architecture.
      dtype: of activations; parameters and statistics stay float32.
      remat: key of `REMAT_POLICIES`: what the backward pass computes again of a block.
      place: not read; where arrays lie inside is left to the compiler.
    """

    config: ResNetConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    place: Placement = unplaced

    @nn.compact
    def __call__(
        self, pixels: Num[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch classes"]:
        """Logits in float32.

        Args:
          pixels: bytes, or floats in [0, 1].
          train: see `BatchNorm`.
        """
        c = self.config
        x = normalized(pixels, c).astype(self.dtype)
        window, stride = STEMS[c.stem]
        x = Conv(c.width, window, stride, name="stem")(x)
        x = jax.nn.relu(BatchNorm(c, name="stem_norm")(x, train))
        if c.stem == "imagenet":
            x = nn.max_pool(x, (3, 3), (2, 2), padding=[(1, 1), (1, 1)])
        policy = REMAT_POLICIES[self.remat]
        block = nn.remat(Block, static_argnums=(2,), policy=policy) if policy else Block
        for stage, count in enumerate(c.blocks):
            for number in range(count):
                stride = 2 if stage > 0 and number == 0 else 1
                x = block(c, c.width * 2**stage, stride, name=f"stage{stage}_block{number}")(x, train)
        x = x.astype(jnp.float32).mean((1, 2))
        shape = (x.shape[-1], c.num_classes)
        kernel = weight(self, "kernel", nn.initializers.normal(_HEAD_STDDEV), shape, ("channels", "classes"))
        bias = weight(self, "bias", nn.initializers.zeros, (c.num_classes,), ("classes",))
        return dot("bf,fc->bc", x, kernel) + materialize(bias)


def normalized(
    pixels: Num[Array, "batch height width channels"], config: ResNetConfig | ViTConfig
) -> Float[Array, "batch height width channels"]:
    """Pixels as the network wants them: bytes scaled to [0, 1], then each channel shifted and scaled."""
    x = pixels.astype(jnp.float32) / 255 if pixels.dtype == jnp.uint8 else pixels
    return (x - jnp.asarray(config.pixel_mean)) / jnp.asarray(config.pixel_std)
