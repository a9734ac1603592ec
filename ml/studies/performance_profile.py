"""Ranks algorithms that solve several problems: performance profiles (Dolan and More 2002), scored as in AlgoPerf."""

import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

UP_TO = 4.0
"""Profiles are looked at from the best time to so many times it (AlgoPerf, Dahl et al. 2023, section 4.2)."""

Times = Mapping[str, Float[np.ndarray, " problems"]]


def ratios(times: Times) -> dict[str, Float[np.ndarray, " problems"]]:
    """Each algorithm's time on each problem over the best time there; infinite: unsolved, also where nobody solved it.

    Args:
      times: by algorithm, on the same problems in the same order; infinite: not solved.
    """
    best = np.min(list(times.values()), axis=0)
    solved = np.isfinite(best)
    return {name: np.where(solved, each / np.where(solved, best, 1.0), math.inf) for name, each in times.items()}


def profile(ratio: Float[np.ndarray, " problems"], tau: Float[np.ndarray, " points"]) -> Float[np.ndarray, " points"]:
    """The share of problems solved within ``tau`` times the best time."""
    return (ratio[None, :] <= tau[:, None]).mean(axis=1)


def scores(times: Times) -> dict[str, float]:
    """The area under each profile from 1 to `UP_TO`, divided by that of who is always best: 0 to 1."""
    # The area under the step of one problem, which rises at its ratio.
    return {name: float(np.clip((UP_TO - each) / (UP_TO - 1), 0, 1).mean()) for name, each in ratios(times).items()}
