"""The four operations on weights, and their rules for plain (dense) arrays."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from ml.weights.shards import gathered, held_axes, mesh_axes, scattered


def _dispatch_on_weight(rule: Callable) -> Any:
    """`functools.singledispatch` on the argument named ``w``, the last positional one."""
    table = functools.singledispatch(rule)

    @functools.wraps(rule)
    def call(*args, **kwargs):
        return table.dispatch(type(args[-1]))(*args, **kwargs)

    call.register = table.register  # type: ignore[attr-defined]
    return call


@_dispatch_on_weight
def dot(spec: str, x: Float[Array, "..."], w: Any, *, out_sharding: PartitionSpec | None = None) -> Float[Array, "..."]:
    """Multiplies activations by a weight: ``einsum(spec, x, w)`` in ``x``'s dtype.

    Args:
      spec: an einsum over ``x`` and the *logical* (dense) shape of ``w``, such as ``"bse,ehd->bshd"``.
      x: activations.
      w: a weight leaf of any registered type; ``dot.register(Leaf)`` adds one.
      out_sharding: placement of the result on an explicit mesh; ``None`` lets JAX infer it.

    Raises:
      TypeError: no rule is registered for the type of ``w``.
    """
    w = _array(w)
    if out_sharding and (token_axes := _gathered_along(spec, x, w, out_sharding)):
        return _separate_gradient(_dot_of_shards(spec, out_sharding, token_axes, x, w))
    return _separate_gradient(jnp.einsum(spec, x, w.astype(x.dtype), out_sharding=out_sharding))


@_dispatch_on_weight
def ragged_dot(x: Float[Array, "rows inner"], group_sizes: Int[Array, " groups"], w: Any) -> Float[Array, "rows outer"]:
    """Multiplies consecutive groups of rows by one matrix each: rows of group ``g`` by ``w[g]``.

    Args:
      x: rows sorted by group.
      group_sizes: rows per group; they sum to at most ``rows``.
      w: logically ``[groups, inner, outer]``.
    """
    return jax.lax.ragged_dot(x, _array(w).astype(x.dtype), group_sizes)


@_dispatch_on_weight
def take(
    indices: Int[Array, "..."], w: Any, *, dtype: Any = None, out_sharding: PartitionSpec | None = None
) -> Float[Array, "... embed"]:
    """Looks rows up: ``w[indices]``, for a weight that is logically ``[rows, embed]``.

    Where the table is cut along ``embed``, each device looks its columns up for all tokens of the devices that hold
    the other columns, and they exchange: what crosses the network is as large as the result, and nothing is held whole.
    """
    w = _array(w)
    cut = mesh_axes(jax.typeof(w).sharding.spec.partitions[-1]) if out_sharding else ()
    if not cut or out_sharding is None:
        rows = w.at[indices].get(out_sharding=out_sharding, mode="clip")
        return rows if dtype is None else rows.astype(dtype)
    outer = [
        tuple(axis for axis in mesh_axes(entry) if axis not in cut) or None for entry in out_sharding.partitions[:-1]
    ]
    rows = w.at[jax.reshard(indices, PartitionSpec(*outer))].get(out_sharding=PartitionSpec(*outer, cut), mode="clip")
    return jax.reshard(rows if dtype is None else rows.astype(dtype), out_sharding)


@_dispatch_on_weight
def materialize(w: Any) -> Float[Array, "..."]:
    """The dense array that a leaf stands for (for biases, norm scales and export)."""
    return _array(w)


def _gathered_along(spec: str, x: jax.Array, w: jax.Array, out: PartitionSpec) -> frozenset[str]:
    """The mesh axes that cut the tokens of ``x``, if ``w`` is cut along some of them and must be gathered (ZeRO-3).

    None where JAX keeps no partial sums apart and the compiler must choose: where tokens enter cut in one way and leave
    in another, and inside of a `jax.shard_map` over other axes (JAX 0.10 and 0.11).
    """
    if jax.sharding.get_abstract_mesh().manual_axes:
        return frozenset()
    inputs, of_out = spec.split("->")
    of_x, of_w = inputs.split(",")
    entries = dict(zip(of_x, jax.typeof(x).sharding.spec.partitions, strict=True))
    results = dict(zip(of_out, out.partitions, strict=True))
    tokens = [label for label in of_x if label not in of_w]
    cut = frozenset(axis for label in tokens for axis in mesh_axes(entries[label]))
    if any(entries[label] != results[label] for label in tokens) or not cut & held_axes(w):
        return frozenset()
    return cut


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _dot_of_shards(
    spec: str, out_sharding: PartitionSpec, token_axes: frozenset[str], x: jax.Array, w: jax.Array
) -> jax.Array:
    """A product with a weight that is gathered for it, and again for its gradient, so that no one keeps it whole.

    The weight's gradient stays a partial sum on each device until it is reduced and cut in one collective. Left to
    itself the compiler sums it whole on every device, since its transposition stands between the two.
    """
    return jnp.einsum(spec, x, gathered(w.astype(x.dtype), token_axes), out_sharding=out_sharding)


def _dot_of_shards_forward(spec, out_sharding, token_axes, x, w):
    return _dot_of_shards(spec, out_sharding, token_axes, x, w), (x, w)


def _dot_of_shards_backward(spec, out_sharding, token_axes, saved, gradient):
    x, w = saved
    whole = gathered(w.astype(x.dtype), token_axes)
    _, pullback = jax.vjp(lambda *xw: jnp.einsum(spec, *xw, out_sharding=out_sharding), x, whole)
    of_x, of_w = pullback(gradient)
    return of_x, scattered(of_w, w)


_dot_of_shards.defvjp(_dot_of_shards_forward, _dot_of_shards_backward)


@jax.custom_vjp
def _separate_gradient(y: jax.Array) -> jax.Array:
    """The identity; on a CPU its gradient is computed in full before it is used.

    Two products read the gradient of a product's result, one of them transposed. XLA's CPU compiler would otherwise
    fuse whatever computes the gradient into the transposing copy, whose strided reads then make it much slower.
    """
    return y


def _separate_backward(_: None, gradient: jax.Array) -> tuple[jax.Array]:
    barrier = jax.lax.optimization_barrier
    return (jax.lax.platform_dependent(gradient, cpu=barrier, default=lambda g: g),)


_separate_gradient.defvjp(lambda y: (y, None), _separate_backward)


def _array(w: Any) -> jax.Array:
    if not hasattr(w, "dtype") or not hasattr(w, "shape"):
        raise TypeError(f"no rule for a leaf of type {type(w).__name__}; add one with `ml.weights.dot.register`")
    return w
