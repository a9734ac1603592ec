"""The FLOPs of a traced program, all that it computes again included."""

import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def computed_flops(jaxpr: Any, kernel_share: float = 1.0) -> float:
    """Counts the FLOPs of all matrix products, loops multiplied out; elementwise work is left out.

    Args:
      jaxpr: of a traced function, such as `jax.stages.Traced.jaxpr`; its shapes are those of the whole mesh.
      kernel_share: of a Pallas kernel's grid, the part that is not skipped (causal attention: about a half).

    Returns:
      FLOPs of all devices together. Of a conditional, the costliest branch; a loop of unknown length counts once.
    """
    total = 0.0
    for eqn in _body(jaxpr).eqns:
        name, params = eqn.primitive.name, eqn.params
        inner = [computed_flops(sub, kernel_share) for sub in _nested(params)]
        if name == "dot_general":
            total += _dot_general(eqn)
        elif name == "ragged_dot_general":
            total += _ragged_dot(eqn)
        elif name == "scan":
            total += params["length"] * sum(inner)
        elif name == "cond":
            total += max(inner, default=0.0)
        elif name == "shard_map":
            total += _manual_devices(params) * sum(inner)
        elif name == "pallas_call":
            total += kernel_share * math.prod(_grid(params)) * sum(inner)
        else:
            total += sum(inner)
    return total


def _body(jaxpr: Any) -> Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr


def _nested(params: dict[str, Any]) -> Iterator[Any]:
    """The programs within an equation's parameters; of a custom derivative only what is run."""
    for key, value in params.items():
        if key in ("fwd_jaxpr_thunk", "jvp_jaxpr_fun", "bwd"):
            continue
        for leaf in jax.tree.leaves(value, is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr)):
            if isinstance(leaf, ClosedJaxpr | Jaxpr):
                yield leaf


def _dot_general(eqn: Any) -> float:
    (contracting, _), _ = eqn.params["dimension_numbers"]
    left, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    return 2.0 * math.prod(out) * math.prod(left[axis] for axis in contracting)


def _ragged_dot(eqn: Any) -> float:
    """Each row meets the matrix of its group alone; where rows are contracted, each group has its own."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contracting, _), _ = numbers.dot_dimension_numbers
    left, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    flops = 2.0 * math.prod(out) * math.prod(left[axis] for axis in contracting)
    groups = eqn.invars[2].aval.shape[-1]
    return flops / groups if set(numbers.lhs_ragged_dimensions) <= set(contracting) else flops


def _manual_devices(params: dict[str, Any]) -> int:
    shape = params["mesh"].shape
    return math.prod(shape[axis] for axis in params.get("manual_axes", shape))


def _grid(params: dict[str, Any]) -> tuple[int, ...]:
    return tuple(size for size in params["grid_mapping"].grid if isinstance(size, int))
