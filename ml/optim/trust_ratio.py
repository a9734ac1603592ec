"""Layerwise adaptation: an update whose norm is proportional to the norm of the tensor it changes."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from ml.optim.masks import Mask, excluding, path_names
from ml.optim.stacking import LogicalAxes

PyTree = Any


def tensor_norm(x: Float[Array, "..."], dims: tuple[int, ...]) -> Float[Array, "..."]:
    """L2 norm over ``dims``, kept as dimensions of size 1, in float32 whatever the type of ``x``."""
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=dims, keepdims=True))


def report_ratio(
    seen: dict[str, Array] | None, path: tuple[Any, ...], ratio: Float[Array, "..."], dims: tuple[int, ...]
) -> None:
    """Notes the ratios of one parameter for whoever asked to see them; the update is computed from the same array.

    A transform that adapts layers takes ``trust_ratios``, an optax extra argument: a dictionary of the caller's, which
    is filled while the step is traced, so the caller must be in the same trace.

    Args:
      seen: the caller's dictionary: ``trust_ratio/``, then the path's names joined by ``/`` -> ratios, stacked as the
        parameter is (a scalar, or ``[layers]``, ``[layers, expert]``), the same on all devices. ``None``: nobody asked.
      path: of the parameter.
      ratio: with ``dims`` kept as dimensions of size 1.
      dims: those of one tensor.
    """
    if seen is None:
        return
    ratio = jnp.squeeze(ratio, dims)
    if any(jax.typeof(ratio).sharding.spec):  # layers over the stages of a pipeline, experts over their owners
        ratio = jax.reshard(ratio, PartitionSpec())
    seen["/".join(("trust_ratio", *path_names(path)))] = ratio


def scale_by_trust_ratio(
    axes: PyTree,
    *,
    adapted: Mask | None = None,
    norm_min: float = 0.0,
    norm_max: float | None = None,
    ratio_min: float = 0.0,
    ratio_max: float | None = None,
) -> optax.GradientTransformationExtraArgs:
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

    def update(
        updates: PyTree,
        state: optax.EmptyState,
        params: PyTree | None = None,
        *,
        trust_ratios: dict[str, Array] | None = None,
        **_: Any,
    ) -> tuple[PyTree, PyTree]:
        if params is None:
            raise ValueError(optax.NO_PARAMS_MSG)

        def adapt(path: tuple[Any, ...], is_adapted: bool, u: Array, x: Array) -> Array:
            if not is_adapted:
                return u
            dims = table.within(path, x)
            weight_norm, update_norm = tensor_norm(x, dims), tensor_norm(u, dims)
            usable = (weight_norm > 0) & (update_norm > 0)
            ratio = jnp.clip(weight_norm, norm_min, norm_max) / jnp.where(usable, update_norm, 1)
            ratio = jnp.where(usable, jnp.clip(ratio, ratio_min, ratio_max), 1)
            report_ratio(trust_ratios, path, ratio, dims)
            return (ratio * u).astype(u.dtype)

        return jax.tree_util.tree_map_with_path(adapt, mask(updates), updates, params), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
