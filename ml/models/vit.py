"""The vision transformer (Dosovitskiy et al. 2021): an image's patches as tokens that all see one another."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Num

from ml.models.attention import SelfAttention
from ml.models.layers import Projection, block_norm
from ml.models.parameters import Placement, placed, unplaced
from ml.models.resnet import normalized
from ml.models.transformer import Table, Transformer
from ml.models.two_tower_config import ViTConfig
from ml.weights import take
from pallas_kernels.flash_attention import Implementation


class ViT(nn.Module):
    """Images to one vector each.

    Attributes:
      config: the architecture.
      dtype: of activations; parameters stay float32.
      remat: key of `ml.models.REMAT_POLICIES`.
      place: maps logical axes of activations to mesh axes.
      attention: see `pallas_kernels.flash_attention`.
    """

    config: ViTConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    place: Placement = unplaced
    attention: Implementation = "auto"

    def setup(self):
        c, blocks = self.config, self.config.blocks
        self.patches = Projection(
            "blp,pe->ble",
            (c.channels * c.patch_size**2, c.embed_dim),
            ("patch", "embed"),
            ("batch", "length", None),
            bias_rank=int(c.patch_bias),
            stddev=c.init_stddev,
            place=self.place,
        )
        self.first_token = Table(1, blocks, "position")
        self.position = Table(c.tokens, blocks, "position")
        if c.pre_norm:
            self.pre_norm = block_norm(blocks)
        self.encoder = Transformer(blocks, self.dtype, self.remat, self.place)

    def __call__(self, pixels: Num[Array, "batch height width channels"]) -> Float[Array, "batch embed"]:
        """The normed last state of the token that stands for the image, of bytes or of floats in [0, 1]."""
        place = self.place("batch", "length", None)
        images = normalized(pixels, self.config)
        patches = self.patches(patched(images, self.config.patch_size).astype(self.dtype))
        positions = jnp.zeros_like(patches[:, :1, 0], jnp.int32) + jnp.arange(self.config.tokens)
        first = take(positions[:, :1], self.first_token(), dtype=self.dtype, out_sharding=place)
        x = jnp.concatenate([first, patches], axis=1)
        x = x + take(positions, self.position(), dtype=self.dtype, out_sharding=place)
        if self.config.pre_norm:
            x = self.pre_norm(x)
        strategy = SelfAttention(None, self.attention, causal=False)
        x, _, _ = self.encoder.run_layers(placed(x, self.place("batch", "residual", None)), strategy, positions)
        return self.encoder.normalize(x[:, :1])[:, 0]


def patched(images: Float[Array, "batch height width channels"], size: int) -> Float[Array, "batch patches values"]:
    """Cuts images into squares of ``size`` pixels, row by row; each as its channels, one whole after another."""
    batch, height, width, channels = images.shape
    rows, columns = height // size, width // size
    cut = _reshaped(images, (batch, rows, size, columns, size, channels))
    return _reshaped(cut.transpose(0, 1, 3, 5, 2, 4), (batch, rows * columns, channels * size**2))


def _reshaped(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """``x`` in another shape with the same rows, which stay where they are."""
    sharding = jax.typeof(x).sharding
    rows = None if sharding.mesh.empty else PartitionSpec(sharding.spec[0], *[None] * (len(shape) - 1))
    return jax.lax.reshape(x, shape, out_sharding=rows)
