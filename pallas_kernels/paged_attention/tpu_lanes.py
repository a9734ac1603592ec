"""Vectors whose last axis is a TPU's lanes."""

import functools

import jax.numpy as jnp
from jax import lax

LANES = 128


def along(x, width: int):
    """``[rows, 128]``, the same in all lanes, as ``[rows, width]``."""
    repeated = jnp.tile(x, (1, -(-width // LANES)))
    return repeated if width % LANES == 0 else repeated[:, :width]


def lane_sums(x):
    """``[rows, n * 128]`` summed to ``[rows, 128]``."""
    return functools.reduce(jnp.add, [x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)])


def low_lanes(shape: tuple[int, int]):
    """Which elements lie in the lower half of the lanes."""
    return lax.broadcasted_iota(jnp.int32, shape, 1) < LANES // 2
