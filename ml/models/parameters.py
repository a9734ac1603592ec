"""How a module declares and reads a parameter: logical axes at initialization, typed leaves ever after."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.core import meta
from jax.sharding import PartitionSpec

from ml.errors import UserError

# Maps the logical axes of an array to its placement; `None` as result leaves the placement to JAX.
Placement = Callable[..., PartitionSpec | None]


STACKED = frozenset({"layers", "expert"})
"""Logical axes along which independent tensors are stacked (scanned layers, experts of one layer)."""


def matrix_axes(names: tuple[str, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of a kernel that its product sums over, and those that it leaves; the stacked ones are neither.

    Args:
      names: the kernel's logical axes.
    """
    dims = [i for i, name in enumerate(names) if name not in STACKED]
    # A block's kernel either leaves the residual stream (embed first) or returns to it (embed last).
    split = -1 if names[dims[-1]] == "embed" else 1
    return tuple(dims[:split]), tuple(dims[split:])


def unplaced(*axes: str | None) -> None:
    """The placement of a model that is not on a mesh."""
    return None


def placed(x: jax.Array, spec: PartitionSpec | None) -> jax.Array:
    """``x`` moved to ``spec``, if it is not there already or off any mesh."""
    return x if spec is None or jax.typeof(x).sharding.spec == spec else jax.reshard(x, spec)


@flax.struct.dataclass
class LogicalAxes(meta.AxisMetadata):
    """A freshly initialized parameter together with the names of its axes; `flax.linen.scan` prepends ``layers``."""

    value: Any
    names: tuple[str, ...] = flax.struct.field(pytree_node=False)

    def unbox(self) -> Any:
        """The bare array."""
        return self.value

    def replace_boxed(self, val: Any) -> "LogicalAxes":
        """The same names around another value."""
        return self.replace(value=val)  # type: ignore[attr-defined]

    def add_axis(self, index: int, params: dict[Any, Any]) -> "LogicalAxes":
        """Called by a lifted transform that stacks parameters."""
        names = list(self.names)
        names.insert(index, params[nn.PARTITION_NAME])
        return self.replace(names=tuple(names))  # type: ignore[attr-defined]

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "LogicalAxes":
        """Called by a lifted transform that takes one slice."""
        names = list(self.names)
        names.pop(index)
        return self.replace(names=tuple(names))  # type: ignore[attr-defined]


def weight(module: nn.Module, name: str, initializer: Callable, shape: tuple[int, ...], axes: tuple[str, ...]) -> Any:
    """Declares (when initializing) or reads (otherwise) the parameter ``name`` of ``module``, kept in float32.

    Reading bypasses ``module.param``, which would compare shapes and so refuse a leaf that is stored in another form
    (low-rank, quantized...).

    Raises:
      UserError: the parameter is missing from the tree.
    """
    if module.is_initializing():

        def boxed(key: jax.Array) -> LogicalAxes:
            return LogicalAxes(initializer(key, shape, jnp.float32), axes)

        return module.param(name, boxed)
    value: Any = module.get_variable("params", name)
    if value is None:
        raise UserError(f"params lack {'/'.join((*module.path, name))}; is this checkpoint of another architecture?")
    return value
