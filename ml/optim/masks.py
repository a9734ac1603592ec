"""Which parameters an optimizer treats as plain vectors, decided by name: biases and norm scales."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

PyTree = Any
Mask = Callable[[PyTree], PyTree]

EXCLUDED = ("bias", "scale")
"""Names that take neither weight decay nor trust-ratio adaptation (LAMB paper, section 4: bias and LayerNorm)."""


def path_names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The names along a `jax.tree_util` key path, outermost first."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def excluding(names: Sequence[str] = EXCLUDED) -> Mask:
    """Makes a mask function ``tree -> tree of bool``: False where any name on the leaf's path is one of ``names``.

    The whole path counts, not only its end: a bias stored as a typed leaf (``.../bias/values``) is still a bias, and
    ``names=("bias", "scale", "embed")`` also spares the embedding table.
    """
    spared = frozenset(names)

    def mask(tree: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(lambda path, _: spared.isdisjoint(path_names(path)), tree)

    return mask
