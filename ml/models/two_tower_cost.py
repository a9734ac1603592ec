"""What a two-tower model costs: parameters, FLOPs and activation memory, from its configuration alone."""

from typing import Any, Literal

import jax.numpy as jnp

from ml.models import cost
from ml.models.cost import ActivationMemory, ParameterCount, visible_keys
from ml.models.two_tower_config import TwoTowerConfig, ViTConfig


def parameter_count(config: TwoTowerConfig) -> ParameterCount:
    """Counts the parameters that `ml.models.init_params` would make."""
    image, text = config.image, cost.parameter_count(config.text)
    # A vocabulary of one is the token that stands for the image.
    blocks = cost.parameter_count(image.blocks)
    patches = (image.channels * image.patch_size**2 + image.patch_bias) * image.embed_dim
    norm = 2 * image.embed_dim * image.pre_norm
    projections = (image.embed_dim + config.text.embed_dim) * config.features
    total = blocks.total + patches + norm + text.total + projections + 1
    return ParameterCount(total, total, blocks.embedding + text.embedding)


def image_flops(config: ViTConfig) -> float:
    """FLOPs of matrix products in the forward pass for one image, a multiplication and an addition counted as two."""
    tokens, blocks = config.tokens, config.blocks
    each = cost.forward_flops_per_token(blocks, tokens, predictions=0)
    # Every token sees all, not only those before it.
    each += 4.0 * blocks.num_heads * blocks.head_dim * blocks.num_layers * (tokens - visible_keys(tokens))
    return tokens * each + 2.0 * (tokens - 1) * config.channels * config.patch_size**2 * config.embed_dim


def forward_flops(config: TwoTowerConfig, text_length: int, batch: int) -> float:
    """The same for one pair, with its row of the similarities.

    Args:
      config: the architecture.
      text_length: tokens of a text, padding included.
      batch: pairs that are compared.
    """
    text = text_length * cost.forward_flops_per_token(config.text, text_length, predictions=0)
    projections = 2.0 * (config.image.embed_dim + config.text.embed_dim) * config.features
    return image_flops(config.image) + text + projections + 2.0 * batch * config.features


def activation_memory(
    config: TwoTowerConfig,
    *,
    rows: int,
    text_length: int,
    remat: str = "none",
    dtype: Any = jnp.float32,
    attention: Literal["xla", "kernel"] = "xla",
) -> ActivationMemory:
    """Predicts the bytes of both towers' activations for one microbatch on one device (`ml.models.cost`).

    Args:
      config: the architecture.
      rows: pairs on the device.
      text_length: tokens of a text.
      remat, dtype, attention: see `ml.models.cost.activation_memory`.
    """
    towers = [
        cost.activation_memory(
            tower, batch=rows, length=length, remat=remat, dtype=dtype, attention=attention, logit_tokens=0
        )
        for tower, length in ((config.image.blocks, config.image.tokens), (config.text, text_length))
    ]
    return ActivationMemory(sum(tower.saved for tower in towers), max(tower.block for tower in towers), 0)


def loss_memory(config: TwoTowerConfig, *, batch: int, shards: int, block: int) -> int:
    """Predicts the bytes that the contrastive loss takes on a device, while no activations live.

    Embeddings of both towers and their gradients, all texts and all their gradients, and four float32 arrays like a
    block of similarities.

    Args:
      config: the architecture.
      batch: pairs.
      shards: devices that share them.
      block: rows of similarities that a device makes at a time; 0: all of its own.
    """
    part = -(-batch // shards)
    rows = min(block or part, part)
    return 4 * (config.features * (4 * part + 2 * batch) + 4 * rows * batch)
