"""The layout: logical axis names -> mesh axes, for parameters, activations and batches alike."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from ml.errors import UserError

# A logical axis goes to these mesh axes. Parameters are cut along `embed` (ZeRO-3) and along heads, MLP width and
# vocabulary (tensor parallelism); activations keep their `embed` axis whole, so they name it None.
DEFAULT_RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "length": (),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "norm": (),
    "position": (),
    "layers": (),
    "expert": (),
    "expert_logits": (),
}


@dataclasses.dataclass(frozen=True)
class Rules:
    """A mesh together with the table that places logical axes on it."""

    mesh: Mesh
    table: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: dict(DEFAULT_RULES), hash=False)

    def spec(self, *axes: str | None) -> PartitionSpec:
        """The placement of an array whose axes have these names; mesh axes of size one are left out.

        Raises:
          ValueError: a name is not in the table, or two axes of the array want the same mesh axis.
        """
        entries: list[Any] = []
        used: set[str] = set()
        for axis in axes:
            if axis is not None and axis not in self.table:
                raise ValueError(f"logical axis {axis!r} is in no rule; known: {', '.join(self.table)}")
            wanted = tuple(name for name in self.table.get(axis or "", ()) if self.mesh.shape[name] > 1)
            if used & set(wanted):
                raise ValueError(f"axes {axes} use mesh axis {sorted(used & set(wanted))[0]!r} twice")
            used |= set(wanted)
            entries.append(wanted if len(wanted) > 1 else wanted[0] if wanted else None)
        return PartitionSpec(*entries)

    def sharding(self, *axes: str | None) -> NamedSharding:
        """`spec`, on the mesh."""
        return NamedSharding(self.mesh, self.spec(*axes))

    def shardings(self, axes: PyTree[tuple[str, ...]], shapes: PyTree) -> PyTree[NamedSharding]:
        """The placement of every parameter.

        Args:
          axes: a tree of tuples of logical names, from `ml.models.logical_axes`.
          shapes: a tree of arrays or shapes with the same structure.

        Raises:
          UserError: an axis does not divide into its shards.
        """

        def place(names: tuple[str, ...], leaf: Any) -> NamedSharding:
            for name, size in zip(names, leaf.shape, strict=True):
                for mesh_axis in self.table[name]:
                    if size % self.mesh.shape[mesh_axis]:
                        raise UserError(
                            f"config.mesh.{mesh_axis}={self.mesh.shape[mesh_axis]} does not divide the model's {name} "
                            f"axis of {size}; choose a divisor of {size}"
                        )
            return self.sharding(*names)

        return jax.tree.map(place, axes, shapes, is_leaf=lambda x: isinstance(x, tuple))

    @property
    def batch_shards(self) -> int:
        """Into how many parts a batch is cut."""
        return int(np.prod([self.mesh.shape[name] for name in self.table["batch"]]))
