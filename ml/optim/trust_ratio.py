"""Layerwise adaptation: an update whose norm is proportional to the norm of the tensor it changes."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from ml.optim.masks import Mask, excluding
from ml.optim.stacking import LogicalAxes

PyTree = Any


def tensor_norm(x: Float[Array, "..."], dims: tuple[int, ...]) -> Float[Array, "..."]:
    """L2 norm over ``dims``, kept as dimensions of size 1, in float32 whatever the type of ``x``."""
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=dims, keepdims=True))


def scale_by_trust_ratio(
    axes: PyTree,
    *,
    adapted: Mask | None = None,
    norm_min: float = 0.0,
    norm_max: float | None = None,
    ratio_min: float = 0.0,
    ratio_max: float | None = None,
) -> optax.GradientTransformation:
    """Multiplies each tensor's update ``u`` by ``phi(||x||) / ||u||`` (You et al. 2020, section 3).

    The norms run over one tensor: scanned layers and experts, stacked in one array, get one ratio each. Where either
    norm is zero the ratio is 1, bounds or not. ``phi(z) = min(max(z, norm_min), norm_max)`` is the paper's; the
    defaults make it the identity, as in the authors' code.

    Args:
      axes: pytree like params whose leaves are tuples of logical axis names.
      adapted: params -> tree of bool; leaves marked False pass through. Default: all but biases and norm scales.
      norm_min, norm_max: bounds on the weight norm (phi); ``None``: unbounded.
      ratio_min, ratio_max: bounds on the ratio itself, as some implementations have them; ``None``: unbounded.
    """
    table = LogicalAxes(axes)
    mask = adapted or excluding()

    def adapt(path: tuple[Any, ...], is_adapted: bool, u: Array, x: Array) -> Array:
        if not is_adapted:
            return u
        dims = table.within(path, x)
        weight_norm, update_norm = tensor_norm(x, dims), tensor_norm(u, dims)
        usable = (weight_norm > 0) & (update_norm > 0)
        ratio = jnp.clip(weight_norm, norm_min, norm_max) / jnp.where(usable, update_norm, 1)
        ratio = jnp.where(usable, jnp.clip(ratio, ratio_min, ratio_max), 1)
        return (ratio * u).astype(u.dtype)

    def update(updates: PyTree, state: optax.EmptyState, params: PyTree | None = None) -> tuple[PyTree, PyTree]:
        if params is None:
            raise ValueError(optax.NO_PARAMS_MSG)
        return jax.tree_util.tree_map_with_path(adapt, mask(updates), updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
