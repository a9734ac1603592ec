"""A weight that is kept in shards and read whole: gathered once a step, its gradient given to the shard."""

import functools
from typing import Any

import flax.struct
import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from ml.weights.dense import dot, materialize, ragged_dot, take


@flax.struct.dataclass
class Gathered:
    """A pair of the same weight twice (ZeRO stages 1 and 2; Rajbhandari et al. 2020, section 5).

    Differentiate with respect to ``shard`` alone. Each use of the weight gives its gradient to the shard at once, so
    within a scan over layers no more than one layer's whole gradient exists.

    Attributes:
      shard: as the state keeps it; nothing is computed from it.
      full: the copy that is multiplied by, in the type of activations.
    """

    shard: Float[Array, "..."]
    full: Float[Array, "..."]


def attach(full: jax.Array, shard: jax.Array) -> jax.Array:
    """``full``, whose gradient goes to ``shard``: reduced, cut and cast as ``shard`` is."""
    kind = jax.typeof(shard)
    return _attach(kind.dtype, None if kind.sharding.mesh.empty else kind.sharding.spec, full, shard)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attach(dtype: Any, spec: PartitionSpec | None, full: jax.Array, shard: jax.Array) -> jax.Array:
    return full


def _backward(dtype: Any, spec: PartitionSpec | None, _: None, gradient: jax.Array) -> tuple[None, jax.Array]:
    gradient = gradient.astype(dtype)
    return None, gradient if spec is None else jax.reshard(gradient, spec)


_attach.defvjp(lambda dtype, spec, full, shard: (full, None), _backward)


@dot.register(Gathered)
def _(spec: str, x: jax.Array, w: Gathered, *, out_sharding: PartitionSpec | None = None) -> jax.Array:
    return dot(spec, x, attach(w.full, w.shard), out_sharding=out_sharding)


@ragged_dot.register(Gathered)
def _(x: jax.Array, group_sizes: jax.Array, w: Gathered) -> jax.Array:
    return ragged_dot(x, group_sizes, attach(w.full, w.shard))


@take.register(Gathered)
def _(indices: jax.Array, w: Gathered, *, dtype: Any = None, out_sharding: PartitionSpec | None = None) -> jax.Array:
    return take(indices, attach(w.full, w.shard), dtype=dtype, out_sharding=out_sharding)


@materialize.register(Gathered)
def _(w: Gathered) -> jax.Array:
    return attach(w.full, w.shard)
