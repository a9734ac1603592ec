"""The FLOPs of a traced program, all that it computes again included."""

import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal


def computed_flops(jaxpr: Any, kernel_share: float = 1.0) -> float:
    """Counts the FLOPs of all matrix products and convolutions, loops multiplied out; elementwise work is left out.

    Products whose results nothing reads are left out too, as compilers do: derivative rules leave many behind.

    Args:
      jaxpr: of a traced function, such as `jax.stages.Traced.jaxpr`; its shapes are those of the whole mesh.
      kernel_share: of a Pallas kernel's grid, the part that is not skipped (causal attention: about a half).

    Returns:
      FLOPs of all devices together. Of a conditional, the costliest branch; a loop of unknown length counts once.
    """
    return _count(_body(jaxpr), [True] * len(_body(jaxpr).outvars), kernel_share)


def _count(jaxpr: Jaxpr, read: list[bool], kernel_share: float) -> float:
    """Of what the results marked in ``read`` depend on."""
    total = 0.0
    for eqn, outputs in _live(jaxpr, read):
        name, params = eqn.primitive.name, eqn.params
        inner = []
        for sub in _nested(params):
            same = len(sub.outvars) == len(outputs) and name not in ("scan", "while", "pallas_call")
            inner.append(_count(sub, outputs if same else [True] * len(sub.outvars), kernel_share))
        if name == "dot_general":
            total += _dot_general(eqn)
        elif name == "conv_general_dilated":
            total += _convolution(eqn)
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


def _live(jaxpr: Jaxpr, read: list[bool]) -> Iterator[tuple[Any, list[bool]]]:
    """The equations that matter, last first, each with those of its results that are read."""
    wanted = {var for var, is_read in zip(jaxpr.outvars, read, strict=True) if is_read and not isinstance(var, Literal)}
    for eqn in reversed(jaxpr.eqns):
        outputs = [var in wanted for var in eqn.outvars]
        if any(outputs) or eqn.effects:
            wanted |= {var for var in eqn.invars if not isinstance(var, Literal)}
            yield eqn, outputs


def _body(jaxpr: Any) -> Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr


def _nested(params: dict[str, Any]) -> Iterator[Jaxpr]:
    """The programs within an equation's parameters; of a custom derivative only what is run."""
    for key, value in params.items():
        if key in ("fwd_jaxpr_thunk", "jvp_jaxpr_fun", "bwd"):
            continue
        for leaf in jax.tree.leaves(value, is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr)):
            if isinstance(leaf, ClosedJaxpr | Jaxpr):
                yield _body(leaf)


def _dot_general(eqn: Any) -> float:
    (contracting, _), _ = eqn.params["dimension_numbers"]
    left, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    return 2.0 * math.prod(out) * math.prod(left[axis] for axis in contracting)


def _convolution(eqn: Any) -> float:
    """Products with padding and with the zeros between the entries of a dilated image are counted too."""
    numbers, kernel, out = eqn.params["dimension_numbers"], eqn.invars[1].aval.shape, eqn.outvars[0].aval.shape
    return 2.0 * math.prod(out) * math.prod(kernel) / kernel[numbers.rhs_spec[0]]


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
