"""A weight as whole numbers of 8 bits and a scale per output channel: a quarter of float32's memory."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float
from jaxtyping import Int8 as Whole

from ml.weights.dense import dot, materialize, ragged_dot, take

_LARGEST = 127


@flax.struct.dataclass
class Int8:
    """The weight ``values * scale`` (symmetric, absmax; Dettmers et al. 2022, section 2.1).

    Products are taken with the whole numbers, in the type of the activations, and their *results* are scaled, so that a
    compiler can convert within the product. XLA's CPU compiler converts one layer's weight before each product instead.

    Attributes:
      values: in the shape of the weight.
      scale: likewise, but 1 wide along the axes that a product sums over.
    """

    values: Whole[Array, "..."]
    scale: Float[Array, "..."]


@functools.partial(jax.jit, static_argnums=1)
def quantize(w: Float[Array, "..."], axes: tuple[int, ...]) -> Int8:
    """Rounds a weight; each of its elements is then off by at most ``absmax / 254`` of its channel.

    Args:
      w: the weight; with more than two axes it is rounded one slice of the first after the other, if these are separate
        channels, as layers are: float32 copies are small. What is not finite makes its whole channel NaN.
      axes: those that a product sums over, of which each channel has all.
    """
    if w.ndim > 2 and 0 not in axes:
        return jax.lax.map(lambda layer: _rounded(layer, tuple(axis - 1 for axis in axes)), w)
    return _rounded(w, axes)


def _rounded(w: jax.Array, axes: tuple[int, ...]) -> Int8:
    w = w.astype(jnp.float32)
    largest = jnp.abs(w).max(axis=axes, keepdims=True)
    # A channel of (nearly) nothing: its scale would not be a normal number.
    scale = jnp.where(largest < _LARGEST * jnp.finfo(jnp.float32).tiny, 1.0, largest / _LARGEST)
    return Int8(jnp.round(w / scale).astype(jnp.int8), scale)


@dot.register(Int8)
def _(spec: str, x: jax.Array, w: Int8, *, out_sharding: PartitionSpec | None = None) -> jax.Array:
    scale = _scale_of_result(spec, w)
    if out_sharding is not None:  # it is cut as the weight is, perhaps in another way than the result
        entries = zip(scale.shape, out_sharding.partitions, strict=True)
        scale = jax.reshard(scale, PartitionSpec(*(entry if size > 1 else None for size, entry in entries)))
    return _scaled(dot(spec, x, w.values, out_sharding=out_sharding), scale)


@ragged_dot.register(Int8)
def _(x: jax.Array, group_sizes: jax.Array, w: Int8) -> jax.Array:
    _check(w, (1,))
    group = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(x.shape[0]), side="right")
    # Rows of no group are zero, whatever their scale.
    return _scaled(ragged_dot(x, group_sizes, w.values), w.scale[:, 0].at[group].get(mode="clip"))


@take.register(Int8)
def _(indices: jax.Array, w: Int8, *, dtype: Any = None, out_sharding: PartitionSpec | None = None) -> jax.Array:
    _check(w, (1,))
    rows = take(indices, w.values, dtype=jnp.float32, out_sharding=out_sharding)
    of_scale = None if out_sharding is None else PartitionSpec(*out_sharding.partitions[:-1], None)
    rows = rows * take(indices, w.scale, out_sharding=of_scale)
    return rows if dtype is None else rows.astype(dtype)


@materialize.register(Int8)
def _(w: Int8) -> jax.Array:
    return w.values.astype(jnp.float32) * w.scale


def _scaled(y: jax.Array, scale: jax.Array) -> jax.Array:
    return (y.astype(jnp.float32) * scale).astype(y.dtype)


def _scale_of_result(spec: str, w: Int8) -> jax.Array:
    """The scale in the order of a result's axes, 1 wide along those that the weight does not have."""
    inputs, of_out = spec.split("->")
    of_w = inputs.split(",")[1]
    summed = tuple(axis for axis, label in enumerate(of_w) if label not in of_out)
    _check(w, summed)
    kept = [label for label in of_w if label in of_out]
    scale = jnp.squeeze(w.scale, summed).transpose([kept.index(label) for label in of_out if label in kept])
    return jnp.expand_dims(scale, [axis for axis, label in enumerate(of_out) if label not in kept])


def _check(w: Int8, summed: tuple[int, ...]) -> None:
    if any(w.scale.shape[axis] != 1 for axis in summed):
        raise ValueError(
            f"a weight of shape {w.values.shape} is summed over axes {summed}, along which its scale, of shape "
            f"{w.scale.shape}, varies: quantize it over these axes"
        )
