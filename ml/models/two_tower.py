"""Images and texts in one space, by a tower each: CLIP (Radford et al. 2021) and BASIC (Pham et al. 2021).

Neither tower lets examples see one another (their norms are layer norms), so a batch may be embedded in parts.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from ml.models.attention import SelfAttention
from ml.models.layers import Projection
from ml.models.parameters import Placement, unplaced, weight
from ml.models.transformer import Transformer
from ml.models.two_tower_config import TwoTowerConfig
from ml.models.vit import ViT
from ml.weights import materialize
from pallas_kernels.flash_attention import Implementation


class TwoTower(nn.Module):
    """The towers, their projections, and the temperature.

    Attributes:
      config: the architecture.
      dtype: of activations; parameters, embeddings and temperature are float32.
      remat: key of `ml.models.REMAT_POLICIES`.
      place: maps logical axes of activations to mesh axes.
      attention: see `pallas_kernels.flash_attention`.
    """

    config: TwoTowerConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    place: Placement = unplaced
    attention: Implementation = "auto"

    def setup(self):
        c = self.config
        self.image = ViT(c.image, self.dtype, self.remat, self.place, self.attention)
        self.text = Transformer(c.text, self.dtype, self.remat, self.place)
        self.image_projection = self._projection(c.image.embed_dim)
        self.text_projection = self._projection(c.text.embed_dim)
        self.logit = _LogScale(c.temperature)

    def __call__(
        self,
        pixels: Num[Array, "batch height width channels"],
        tokens: Int[Array, "batch length"],
        segment_ids: Int[Array, "batch length"] | None = None,
    ) -> tuple[Float[Array, "batch features"], Float[Array, "batch features"]]:
        """`embed_images` and `embed_texts`."""
        if self.is_initializing():
            self.log_scale()
        return self.embed_images(pixels), self.embed_texts(tokens, segment_ids)

    def embed_images(self, pixels: Num[Array, "batch height width channels"]) -> Float[Array, "batch features"]:
        """Unit vectors, float32, of bytes or of floats in [0, 1]."""
        return _unit(self.image_projection(self.image(pixels)))

    def embed_texts(
        self, tokens: Int[Array, "batch length"], segment_ids: Int[Array, "batch length"] | None = None
    ) -> Float[Array, "batch features"]:
        """Unit vectors, float32.

        Args:
          tokens: a text in each row, from its start on.
          segment_ids: 1 where there is text, 0 behind it; default: all is text.
        """
        segments = jnp.ones_like(tokens) if segment_ids is None else segment_ids
        hidden, _, _ = self.text(tokens, SelfAttention(segments, self.attention))
        # A masked sum, not a gather: it fuses, and its gradient is no scatter.
        last = jnp.arange(tokens.shape[1]) == segments.sum(axis=1, keepdims=True) - 1
        return _unit(self.text_projection(jnp.where(last[..., None], hidden, 0).sum(axis=1)))

    def log_scale(self) -> Float[Array, ""]:
        """Logarithm of what similarities are multiplied by, one over the temperature."""
        return self.logit()

    def _projection(self, embed_dim: int) -> Projection:
        shape = (embed_dim, self.config.features)
        stddev = embed_dim**-0.5
        return Projection("be,ef->bf", shape, ("embed", "features"), ("batch", None), stddev=stddev, place=self.place)


class _LogScale(nn.Module):
    """The logarithm of one over the temperature."""

    temperature: float

    @nn.compact
    def __call__(self) -> Float[Array, ""]:
        # Called a scale, so that it neither decays nor is adapted (`ml.optim.masks`).
        start = nn.initializers.constant(-math.log(self.temperature))
        return materialize(weight(self, "scale", start, (), ()))


def _unit(x: Float[Array, "batch features"]) -> Float[Array, "batch features"]:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.square(x).sum(axis=-1, keepdims=True))
