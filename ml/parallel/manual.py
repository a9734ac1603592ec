"""Code that sees its own shard of every array and talks to its neighbours itself."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import PyTree


def manual(body: Callable, in_specs: PyTree, out_specs: PyTree, check_vma: bool = True) -> Callable:
    """Maps ``body`` over the shards of a mesh, along every axis that is not manual already: on a bare device, ``body``.

    The map is a whole to JAX's partial evaluation. Under `jax.lax.scan` that would otherwise split it into what depends
    on the scanned values and what does not, and where an outer `shard_map` (a pipeline's stages) has made an axis
    manual, the arrays between the halves are given that axis a second time, which is refused when lowering (JAX 0.10
    and 0.11). So the result has no reverse-mode derivative: give it one with `jax.custom_vjp`, forward and backward
    each by a map of its own.

    Args:
      body: positional arguments are pytrees of arrays.
      in_specs, out_specs: as in `jax.shard_map`; they must be those of the arguments.
      check_vma: likewise.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return body
    free = frozenset(mesh.axis_names) - frozenset(mesh.manual_axes)
    mapped = jax.shard_map(body, in_specs=in_specs, out_specs=out_specs, axis_names=free, check_vma=check_vma)
    whole = jax.custom_batching.custom_vmap(mapped)

    @whole.def_vmap
    def _(axis_size: int, in_batched: list[Any], *args: Any) -> tuple[Any, Any]:
        axes = jax.tree.map(lambda batched: 0 if batched else None, in_batched)
        out = jax.vmap(mapped, in_axes=tuple(axes), axis_size=axis_size)(*args)
        return out, jax.tree.map(lambda _: True, out)

    return whole
