"""The architecture of a model of images and texts, as data: a vision transformer and a text tower."""

import dataclasses
from typing import Any, Literal

from ml.models.config import TransformerConfig

# What the blocks of GPT-2, of CLIP's text tower and of vision transformers have in common.
LAYER_NORM_BLOCKS: dict[str, Any] = {
    "gated_mlp": False,
    "norm": "layer",
    "position_embedding": "learned",
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
    "tie_embeddings": True,
}


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """A vision transformer, pre-LN, whose first token (no patch) stands for the image.

    Attributes:
      image_size: pixels of an image along each side.
      patch_size: pixels of a patch along each side; divides ``image_size``.
      num_layers, embed_dim, num_heads, mlp_dim: see `TransformerConfig`.
      channels: values of a pixel.
      activation: nonlinearity of the MLP.
      norm_eps: added to the variance.
      patch_bias: whether patches are embedded with a bias.
      pre_norm: a norm before the first block too (CLIP).
      init_stddev: see `TransformerConfig`.
      pixel_mean, pixel_std: of the channels of images in [0, 1]; one number for all channels or one for each.
    """

    image_size: int
    patch_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    mlp_dim: int
    channels: int = 3
    activation: Literal["gelu", "gelu_tanh", "gelu_quick"] = "gelu"
    norm_eps: float = 1e-5
    patch_bias: bool = True
    pre_norm: bool = False
    init_stddev: float = 0.02
    pixel_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    pixel_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self):
        if self.patch_size < 1 or self.image_size % self.patch_size:
            raise ValueError(f"patch_size={self.patch_size} does not divide image_size={self.image_size}")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide embed_dim={self.embed_dim}")
        for name in ("pixel_mean", "pixel_std"):
            if len(getattr(self, name)) not in (1, self.channels):
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for channels={self.channels}")
        if min(self.pixel_std) <= 0:
            raise ValueError(f"pixel_std={list(self.pixel_std)} must be positive")

    @property
    def tokens(self) -> int:
        """Patches, and the token that stands for all."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def blocks(self) -> TransformerConfig:
        """Its blocks as those of a transformer, whose vocabulary nothing reads."""
        return TransformerConfig(
            vocab_size=1,
            num_layers=self.num_layers,
            embed_dim=self.embed_dim,
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            head_dim=self.embed_dim // self.num_heads,
            mlp_dim=self.mlp_dim,
            max_length=self.tokens,
            activation=self.activation,
            norm_eps=self.norm_eps,
            init_stddev=self.init_stddev,
            **LAYER_NORM_BLOCKS,
        )


@dataclasses.dataclass(frozen=True)
class TwoTowerConfig:
    """An image tower and a text tower.

    Attributes:
      image: the vision transformer.
      text: a causal transformer, whose state at a text's last token stands for the text; `text_tower` makes one.
      features: dimensions of the space that both are projected to.
      temperature: that similarities are divided by at first; it is learned.
      kind: tells this architecture from others.
    """

    image: ViTConfig
    text: TransformerConfig
    features: int
    temperature: float = 0.07
    kind: Literal["two_tower"] = "two_tower"

    def __post_init__(self):
        if self.features < 1 or self.temperature <= 0:
            raise ValueError(f"need features={self.features} >= 1 and temperature={self.temperature} > 0")
        if self.text.encoder is not None or self.text.moe is not None:
            raise ValueError("text must be a dense decoder-only transformer")
        if not self.text.tie_embeddings:
            raise ValueError("text.tie_embeddings=False: a tower writes no text and has no unembedding; set it to True")


def text_tower(
    *, vocab_size: int, num_layers: int, embed_dim: int, num_heads: int, max_length: int = 77, **more: Any
) -> TransformerConfig:
    """The text tower of a CLIP: pre-LN blocks with biases, learned positions, an MLP four times as wide.

    Args:
      vocab_size, num_layers, embed_dim, num_heads, max_length, more: see `TransformerConfig`.
    """
    return TransformerConfig(
        vocab_size=vocab_size,
        num_layers=num_layers,
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=embed_dim // num_heads,
        max_length=max_length,
        **{"mlp_dim": 4 * embed_dim, "activation": "gelu", **LAYER_NORM_BLOCKS, **more},
    )
