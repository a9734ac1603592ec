"""A weight that is kept in shards and read whole: gathered once a step, its gradient given to the shard."""

from typing import Any

import flax.struct
import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from ml.weights.dense import dot, materialize, ragged_dot, take
from ml.weights.shards import scattered


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


@jax.custom_vjp
def attach(full: jax.Array, shard: jax.Array) -> jax.Array:
    """``full``, whose gradient goes to ``shard``: reduced, cut and cast as ``shard`` is."""
    return full


# The shard is kept for its type alone; it is an argument of the step in any case.
attach.defvjp(lambda full, shard: (full, shard), lambda shard, gradient: (None, scattered(gradient, shard)))


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
