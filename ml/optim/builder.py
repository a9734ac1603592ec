"""What every optimizer's builder is given, besides the options of its own."""

import dataclasses
from typing import Any, Literal

import optax

from ml.optim.masks import Mask

PyTree = Any

MomentDtype = Literal["float32", "bfloat16"] | None
"""Storage type of a first moment; None: the parameter's own."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The part of an optimizer's setting that all optimizers share.

    Attributes:
      schedule: step (int32 scalar) -> learning rate.
      weight_decay: strength of the decay.
      decays: params -> tree of bool, the leaves that decay (`ml.optim.masks.excluding`).
      axes: pytree like params whose leaves are tuples of logical axis names.
    """

    schedule: optax.Schedule
    weight_decay: float
    decays: Mask
    axes: PyTree
