"""A stored tensor of a Hugging Face checkpoint as views of leaves of the parameter tree."""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Part:
    """A stored tensor, or one of the blocks concatenated into it, as a view of a leaf.

    Attributes:
      path: the leaf, as ``layers/attention/query/kernel``.
      index: leading indices into the leaf: the layer, then the expert.
      shape: shape as stored.
      transposed: the last two stored axes are swapped with respect to the leaf.
    """

    path: str
    index: tuple[int, ...]
    shape: tuple[int, ...]
    transposed: bool

    def view(self, indexed: np.ndarray) -> np.ndarray:
        """The leaf, already indexed, seen in the stored shape; vectors are seen as one row."""
        if self.transposed:
            *batch, rows, columns = self.shape
            return indexed.reshape(*batch, columns, rows).swapaxes(-1, -2)
        return indexed.reshape(self.shape if len(self.shape) > 1 else (1, -1))


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of the checkpoint: its name and the parts concatenated along ``axis`` (1: fused projections)."""

    name: str
    parts: tuple[Part, ...]
    axis: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored: that of its parts, put together."""
        first = self.parts[0].shape
        if not first:  # a scalar
            return ()
        axis = min(self.axis, len(first) - 1)
        return (*first[:axis], sum(part.shape[axis] for part in self.parts), *first[axis + 1 :])


def part(path: str, index: tuple[int, ...], shape: tuple[int, ...], inputs: int, transposed: bool = False) -> Part:
    """A part from the leaf's own (indexed) shape, of which the first ``inputs`` axes are multiplied away."""
    if inputs == 0 or len(shape) == 1:
        return Part(path, index, (math.prod(shape),), False)
    rows, columns = math.prod(shape[:inputs]), math.prod(shape[inputs:])
    return Part(path, index, (columns, rows) if transposed else (rows, columns), transposed)
