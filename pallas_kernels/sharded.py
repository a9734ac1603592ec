"""Runs a kernel on each device's own part of its operands, for kernels that know nothing of sharding."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec


def on_shards(function: Callable[..., Any], operands: Sequence[Any], out_like: Any) -> Any:
    """``function(*operands)``, mapped over the mesh axes along which the operands are cut.

    Args:
      function: of the operands' shards; what it computes for a shard may depend on that shard alone.
      operands: arrays, pytrees of arrays, or ``None`` for one that is not given.
      out_like: a pytree like the result, of arrays that are cut as its arrays are to be.

    Returns:
      The result, on the same mesh. Off any mesh, or where all axes are manual already, a plain call.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}
    if not axes:
        return function(*operands)
    mapped = jax.shard_map(
        function,
        in_specs=tuple(_specs(x) for x in operands),
        out_specs=_specs(out_like),
        axis_names=axes,
        check_vma=False,  # Pallas calls do not say over which axes their results vary
    )
    return mapped(*operands)


def _specs(tree: Any) -> Any:
    return PartitionSpec() if tree is None else jax.tree.map(lambda x: jax.typeof(x).sharding.spec, tree)
