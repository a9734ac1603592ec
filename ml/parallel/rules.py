"""The layout: logical axis names -> mesh axes, for parameters, activations and batches alike."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from ml.errors import UserError
from ml.parallel.mesh import MeshConfig, make_mesh

# The ranks along these axes multiply the same dense parameters with different tokens.
_REPLICAS = ("data", "fsdp", "expert", "sequence")

Kind = Literal["state", "compute", "gradients"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which of the axes that share a parameter's work also share its bytes.

    Attributes:
      state: cut parameters as they are kept from step to step, with optimizer state and average.
      compute: cut parameters as the layers read them: gathered from ``state`` once a step where it differs, else layer
        by layer.
      gradients: cut gradients as they are accumulated.
    """

    state: tuple[str, ...]
    compute: tuple[str, ...]
    gradients: tuple[str, ...]


# Rajbhandari et al. 2020 (ZeRO), section 5. `hybrid` keeps whole copies along `data`, so that only gradients cross it.
LAYOUTS: Mapping[str, Layout] = {
    "ddp": Layout((), (), ()),
    "zero1": Layout(_REPLICAS, (), ()),
    "zero2": Layout(_REPLICAS, (), _REPLICAS),
    "zero3": Layout(_REPLICAS, _REPLICAS, _REPLICAS),
    "hybrid": Layout(*(tuple(axis for axis in _REPLICAS if axis != "data"),) * 3),
}

# A logical axis goes to these mesh axes. Activations keep their `embed` axis whole, so they name it None. Parameters
# are besides cut along `embed` (of an expert's kernel: `expert_embed`), as the layout says.
_TABLE: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "length": ("sequence",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "norm": (),
    "position": (),
    "token_type": (),
    "features": (),  # between the layers of an encoder's heads
    "classes": (),
    "layers": ("stage",),
    "expert": ("expert",),
    "expert_logits": (),
    "window": (),  # of a convolution
    "channels": (),
    "patch": (),  # of pixels
}


@dataclasses.dataclass(frozen=True)
class Rules:
    """A mesh together with the table that places logical axes on it.

    Attributes:
      mesh: the devices.
      layout: key of `LAYOUTS`.
      sequence_residual, sequence_order: see `MeshConfig`.
    """

    mesh: Mesh
    layout: str = "hybrid"
    sequence_residual: bool = False
    sequence_order: Literal["zigzag", "contiguous"] = "zigzag"

    @classmethod
    def make(cls, config: MeshConfig, devices: Any = None) -> "Rules":
        """The rules on a new mesh; see `make_mesh`."""
        mesh = make_mesh(config, devices)
        return cls(mesh, config.layout, config.sequence_residual, config.sequence_order)

    @functools.cached_property
    def _tables(self) -> dict[str, dict[str, tuple[str, ...]]]:
        residual = ("sequence", "tensor") if self.sequence_residual else ("sequence",)
        tables = {}
        for kind, cut in dataclasses.asdict(LAYOUTS[self.layout]).items():
            expert_cut = tuple(axis for axis in cut if axis != "expert")
            tables[kind] = {**_TABLE, "residual": residual, "embed": cut, "expert_embed": expert_cut}
        return tables

    def spec(self, *axes: str | None, kind: Kind = "state") -> PartitionSpec:
        """The placement of an array whose axes have these names; mesh axes of size one are left out.

        Args:
          axes: logical names; ``None`` is a whole axis.
          kind: of a parameter; activations are the same in all.

        Raises:
          ValueError: a name is not in the table, or two axes of the array want the same mesh axis.
        """
        table = self._tables[kind]
        entries: list[Any] = []
        used: set[str] = set()
        for axis in axes:
            if axis is not None and axis not in table:
                raise ValueError(f"logical axis {axis!r} is in no rule; known: {', '.join(table)}")
            wanted = tuple(name for name in table.get(axis or "", ()) if self.mesh.shape[name] > 1)
            if used & set(wanted):
                raise ValueError(f"axes {axes} use mesh axis {sorted(used & set(wanted))[0]!r} twice")
            used |= set(wanted)
            entries.append(wanted if len(wanted) > 1 else wanted[0] if wanted else None)
        return PartitionSpec(*entries)

    def sharding(self, *axes: str | None, kind: Kind = "state") -> NamedSharding:
        """`spec`, on the mesh."""
        return NamedSharding(self.mesh, self.spec(*axes, kind=kind))

    def shardings(self, axes: PyTree[tuple[str, ...]], shapes: PyTree, kind: Kind = "state") -> PyTree[NamedSharding]:
        """The placement of every parameter.

        Args:
          axes: a tree of tuples of logical names, from `ml.models.logical_axes`.
          shapes: a tree of arrays or shapes with the same structure.
          kind: as it is kept, as layers read it, or as its gradient is accumulated.

        Raises:
          UserError: an axis does not divide into its shards.
        """

        def place(names: tuple[str, ...], leaf: Any) -> NamedSharding:
            for name, size in zip(names, leaf.shape, strict=True):
                self._check_divides(name, size, kind)
            return self.sharding(*names, kind=kind)

        return jax.tree.map(place, axes, shapes, is_leaf=lambda x: isinstance(x, tuple))

    def _check_divides(self, name: str, size: int, kind: Kind) -> None:
        degrees = {axis: self.mesh.shape[axis] for axis in self._tables[kind][name] if self.mesh.shape[axis] > 1}
        if size % math.prod(degrees.values()) == 0:
            return
        if len(degrees) == 1:
            ((axis, degree),) = degrees.items()
            raise UserError(
                f"config.mesh.{axis}={degree} does not divide the model's {name} axis of {size}; "
                f"choose a divisor of {size}"
            )
        product = " x ".join(f"{axis}={degree}" for axis, degree in degrees.items())
        raise UserError(
            f"config.mesh: {product} (layout {self.layout}) does not divide the model's {name} axis of {size}; choose "
            f"degrees whose product divides {size}, or another config.mesh.layout"
        )

    @property
    def partial_gradient_axes(self) -> frozenset[str]:
        """The mesh axes along which a kernel's gradient may stay a partial sum on each device for a while.

        They cut the tokens but not the kernel. Where residuals are cut along ``tensor``, tokens enter a product cut in
        one way and leave it in another, whose partial sums JAX does not keep apart; nor does it in a `shard_map`, which
        the stages of a pipeline are.
        """
        cut, shape = LAYOUTS[self.layout].compute, self.mesh.shape
        axes = frozenset(axis for axis in _REPLICAS if axis not in cut and shape[axis] > 1)
        return frozenset() if shape["stage"] > 1 or (self.sequence_residual and shape["tensor"] > 1) else axes

    @property
    def batch_shards(self) -> int:
        """Into how many parts a batch is cut."""
        return math.prod(self.mesh.shape[name] for name in _TABLE["batch"])
