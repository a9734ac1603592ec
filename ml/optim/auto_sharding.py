"""Lets a transform that knows nothing of explicit sharding run on explicitly sharded parameters."""

from typing import Any

import jax
import optax

PyTree = Any


def in_auto_axes(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs ``transform.update`` with the compiler choosing shardings inside, and the inputs' shardings outside.

    Flattening, reshaping or multiplying sharded arrays (an inner product over a tree, Newton-Schulz iterations) is
    refused or ambiguous under explicit mesh axes. The updates leave sharded as the gradients came, the state as it was.
    """

    def update(updates: PyTree, state: PyTree, params: PyTree | None = None) -> tuple[PyTree, PyTree]:
        shardings = jax.tree.map(lambda x: jax.typeof(x).sharding, (updates, state))
        if all(sharding.mesh.empty for sharding in jax.tree.leaves(shardings)):
            return transform.update(updates, state, params)
        return jax.sharding.auto_axes(transform.update, out_sharding=shardings)(updates, state, params)

    return optax.GradientTransformation(transform.init, update)
