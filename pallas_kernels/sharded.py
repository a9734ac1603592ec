"""Runs a kernel on each device's own part of its operands, for kernels that know nothing of sharding."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec


def on_shards(function: Callable[..., jax.Array], operands: Sequence[Any], out_like: jax.Array) -> jax.Array:
    """``function(*operands)``, mapped over the mesh axes along which the operands are cut.

    Args:
      function: of the operands' shards; what it computes for a shard may depend on that shard alone.
      operands: arrays, or ``None`` for one that is not given.
      out_like: the result is cut like this one.

    Returns:
      The result, on the same mesh. Off any mesh, or where all axes are manual already, a plain call.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}
    if not axes:
        return function(*operands)
    specs = tuple(PartitionSpec() if x is None else jax.typeof(x).sharding.spec for x in operands)
    mapped = jax.shard_map(
        function,
        in_specs=specs,
        out_specs=jax.typeof(out_like).sharding.spec,
        axis_names=axes,
        check_vma=False,  # Pallas calls do not say over which axes their results vary
    )
    return mapped(*operands)
