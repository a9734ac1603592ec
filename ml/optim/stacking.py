"""Parameters stacked along a layer or expert axis, treated as the separate tensors that they are."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from ml.models.parameters import STACKED

PyTree = Any


class LogicalAxes:
    """Looks up a parameter's logical axes by its path, so that partial and masked trees work as well.

    Args:
      axes: pytree with the structure of the parameters (or of a superset), whose leaves are tuples of axis names.
    """

    def __init__(self, axes: PyTree):
        leaves = jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda node: isinstance(node, tuple))
        self._names = {jax.tree_util.keystr(path): names for path, names in leaves}

    def names(self, path: tuple[Any, ...], leaf: jax.Array) -> tuple[str, ...]:
        """The axis names of the parameter at ``path``.

        Raises:
          ValueError: no axes are known for ``path``, or not one per dimension of ``leaf``.
        """
        where = jax.tree_util.keystr(path)
        if where not in self._names:
            raise ValueError(f"no logical axes are given for parameter {where}")
        names = self._names[where]
        if len(names) != leaf.ndim:
            raise ValueError(f"parameter {where} has shape {leaf.shape}, but logical axes {names}")
        return names

    def stacked(self, path: tuple[Any, ...], leaf: jax.Array) -> tuple[int, ...]:
        """Dimensions of ``leaf`` that enumerate separate tensors."""
        return tuple(i for i, name in enumerate(self.names(path, leaf)) if name in STACKED)

    def within(self, path: tuple[Any, ...], leaf: jax.Array) -> tuple[int, ...]:
        """Dimensions of ``leaf`` that lie inside one tensor."""
        return tuple(i for i, name in enumerate(self.names(path, leaf)) if name not in STACKED)


def per_layer(transform: optax.GradientTransformation, axes: PyTree) -> optax.GradientTransformation:
    """Applies ``transform`` to every tensor by itself: each leaf, and each slice of a stacked leaf.

    Use it around a transform whose statistics couple the elements of one tensor (Adafactor's factored moments, SM3's
    covers, clipping by a block's RMS), so that scanned layers train exactly as unscanned ones. It must not be used
    around a transform that reads the whole tree (a global norm): each tensor would be a tree of its own.

    The state is a tree like the parameters with one state of ``transform`` at each leaf, stacked as the leaf is.
    ``transform`` sees bare arrays, so a mask by name belongs outside of it.

    Raises:
      ValueError (on use): a stacked axis that is not leading.
    """
    table = LogicalAxes(axes)

    def mapped(function: Callable[..., Any], path: tuple[Any, ...], leaf: jax.Array) -> Callable[..., Any]:
        stacked = table.stacked(path, leaf)
        if stacked != tuple(range(len(stacked))):
            raise ValueError(
                f"{jax.tree_util.keystr(path)}: stacked axes must come first, got {table.names(path, leaf)}"
            )
        for _ in stacked:
            function = jax.vmap(function)
        return function

    def init(params: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(lambda path, x: mapped(transform.init, path, x)(x), params)

    def update(updates: PyTree, state: PyTree, params: PyTree | None = None) -> tuple[PyTree, PyTree]:
        if params is None:
            raise ValueError(optax.NO_PARAMS_MSG)
        pairs = jax.tree_util.tree_map_with_path(
            lambda path, g, s, x: mapped(transform.update, path, g)(g, s, x), updates, state, params
        )
        return tuple(jax.tree.map(lambda _, pair, i=i: pair[i], updates, pairs) for i in range(2))

    return optax.GradientTransformation(init, update)
