"""How many steps a run takes to a loss, read off its noisy curve, and the critical batch of runs that took them."""

import math

import numpy as np
from jaxtyping import Float

# The loss of a step is averaged with this share of the steps before and after it: a curve is about a power law, so that
# its logarithm bends little over so many.
_SHARE = 1 / 8


def smoothed(losses: Float[np.ndarray, "steps"]) -> Float[np.ndarray, "steps"]:
    """Centered means over windows that grow with the step, and shrink alike on both sides towards the ends."""
    index = np.arange(len(losses))
    half = np.minimum(np.maximum(2, (_SHARE * index).astype(int)), np.minimum(index, len(losses) - 1 - index))
    total = np.concatenate([[0.0], np.cumsum(losses, dtype=np.float64)])
    return (total[index + half + 1] - total[index - half]) / (2 * half + 1)


def steps_to(losses: Float[np.ndarray, "steps"], target: float) -> float:
    """The first step after which the smoothed loss is at most ``target``, between two steps; infinite: none."""
    curve = smoothed(losses)
    below = np.flatnonzero(curve <= target)
    if not len(below):
        return math.inf
    first = int(below[0])
    if first == 0:
        return 1.0
    before, after = curve[first - 1], curve[first]
    return first + float((before - target) / (before - after))
