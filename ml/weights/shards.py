"""A weight that is cut along axes that cut the tokens too: gathered for a product, its gradient given to the shards."""

import jax
from jax.sharding import PartitionSpec

_Entry = str | tuple[str, ...] | None


def mesh_axes(entry: _Entry) -> tuple[str, ...]:
    """The mesh axes in one entry of a `PartitionSpec`."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def held_axes(x: jax.Array) -> frozenset[str]:
    """The mesh axes that ``x`` is cut along."""
    return frozenset(axis for entry in jax.typeof(x).sharding.spec.partitions for axis in mesh_axes(entry))


def gathered(w: jax.Array, axes: frozenset[str]) -> jax.Array:
    """``w`` whole along ``axes``, typed (`PartitionSpec.reduced`) so that its gradient is not summed along them."""
    entries = jax.typeof(w).sharding.spec.partitions
    kept = [tuple(axis for axis in mesh_axes(entry) if axis not in axes) or None for entry in entries]
    return jax.reshard(w, PartitionSpec(*kept, reduced=axes))


def scattered(gradient: jax.Array, w: jax.Array) -> jax.Array:
    """The gradient of a weight as the cotangent of ``w``, in its type and place.

    It arrives as a partial sum on each device. It is cut before it is summed along what does not cut ``w``, so that
    less is summed; and where ``w`` is typed so, it stays a partial sum along those axes, for the caller to sum later.
    """
    kept, dtype = jax.typeof(w).sharding.spec, jax.typeof(w).dtype
    if jax.typeof(gradient).sharding.spec == PartitionSpec(*kept.partitions, unreduced=kept.reduced):
        return gradient.astype(dtype)
    # In full precision, and with a barrier: the compiler would move a transposition between sum and cut, and then sum
    # everything everywhere instead of reducing and cutting in one collective.
    gradient = jax.lax.optimization_barrier(gradient.astype(dtype))
    apart = jax.typeof(gradient).sharding.spec.unreduced
    cutting = [axis for entry in kept.partitions for axis in mesh_axes(entry) if axis in apart]
    # One axis after another: a TPU reduces and cuts at once along one dimension of its torus, but not along two.
    for count in range(1, len(cutting) + 1):
        later = frozenset(cutting[count:])
        entries = [tuple(axis for axis in mesh_axes(entry) if axis not in later) or None for entry in kept.partitions]
        gradient = jax.reshard(gradient, PartitionSpec(*entries, unreduced=apart - set(cutting[:count])))
    whole = PartitionSpec(*kept.partitions, unreduced=kept.reduced)
    return gradient if jax.typeof(gradient).sharding.spec == whole else jax.reshard(gradient, whole)
