"""Rotary position embedding and its long-context rescalings (linear, Llama 3, YaRN)."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ml.models.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Angular frequency of each pair of dimensions, in radians per token: float32 ``[head_dim / 2]``.

    Sources: Su et al. 2021 (RoFormer) eq. 15; Chen et al. 2023 (linear interpolation); the Llama 3.1 model card;
    Peng et al. 2023 (YaRN), section 3.
    """
    base = rope.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.scaling == "none":
        return base.astype(np.float32)
    if rope.scaling == "linear":
        return (base / rope.factor).astype(np.float32)
    if rope.scaling == "llama3":
        rotations = rope.original_length * base / (2 * math.pi)  # turns within the original context
        keep = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = np.clip(keep, 0.0, 1.0)
    else:  # yarn: a linear ramp over dimensions between the two band edges
        low = _dimension_of(rope.beta_fast, rope, head_dim)
        high = _dimension_of(rope.beta_slow, rope, head_dim)
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        ramp = (np.arange(head_dim // 2) - low) / max(high - low, 1e-3)
        keep = 1.0 - np.clip(ramp, 0.0, 1.0)
    return (keep * base + (1 - keep) * base / rope.factor).astype(np.float32)


def attention_factor(rope: RopeConfig) -> float:
    """YaRN's multiplier on rotated queries and keys (its square root of 1/t, eq. 22); 1 for every other scaling."""
    if rope.scaling != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    return 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0


def rotation(
    positions: Int[Array, "*batch length"], rope: RopeConfig, head_dim: int
) -> tuple[Float[Array, "*batch length 1 half"], Float[Array, "*batch length 1 half"]]:
    """Cosine and sine of every rotation angle, float32, computed once and shared by all layers."""
    angles = positions[..., None, None].astype(jnp.float32) * inverse_frequencies(rope, head_dim)
    factor = attention_factor(rope)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(
    x: Float[Array, "*batch length heads head_dim"],
    cos: Float[Array, "*batch length 1 half"],
    sin: Float[Array, "*batch length 1 half"],
) -> Float[Array, "*batch length heads head_dim"]:
    """Rotates each head, pairing dimension ``i`` with ``i + head_dim / 2`` (the half-split convention)."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _dimension_of(rotations: float, rope: RopeConfig, head_dim: int) -> float:
    """Index of the pair that turns ``rotations`` times within the original context."""
    return head_dim * math.log(rope.original_length / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))
