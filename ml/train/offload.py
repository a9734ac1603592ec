"""State that rests in the hosts' memory between its uses, so that the devices' is free for activations."""

import jax
from jaxtyping import PyTree

HOST = "pinned_host"


def moved_to_host(tree: PyTree) -> PyTree:
    """Inside jit: the arrays of ``tree``, cut as before, in pinned host memory; scalars stay where they are."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Host) if on_host(x) else x, tree)


def moved_to_device(tree: PyTree) -> PyTree:
    """Inside jit: the inverse of `moved_to_host`."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device) if on_host(x) else x, tree)


def on_host(leaf: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Whether a leaf of an offloaded tree rests on the host: a scalar is not worth the trip."""
    return len(leaf.shape) > 0
