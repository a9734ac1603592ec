"""Predicts a large model's whole loss curve, at any batch size, from the curves of small ones.

Source: Su et al. 2024, "Unraveling the Mystery of Scaling Laws: Part I", whose forms are those of Kaplan et al. 2020
and McCandlish et al. 2018. A model of N parameters (those of tables left out) that has done S steps of B tokens has

    L = (Nc / N)^aN + (Sc / Smin)^aS,  Smin = S / (1 + Bc(L) / B),  Bc(L) = B0 / L^(1 / aB).

There is no irreducible term. The constants belong to one tokenizer, mix of data, context length and schedule, and are
fitted anew for each set-up.
"""

import dataclasses
import math
import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy import optimize

from ml.errors import UserError
from ml.plan.step_law import non_embedding_parameters
from ml.train.reporting import read_metrics
from ml.train.workdir import Workdir

NAMES = ("a_n", "n_c", "a_b", "b_0", "a_s", "s_c")
# The logarithm of a loss is sought by halving an interval to about a thousandth, from where Newton's method converges.
_HALVINGS, _NEWTON = 14, 4


@dataclasses.dataclass(frozen=True)
class Curve:
    """Losses of one run, at a constant learning rate that suits its batch.

    Attributes:
      parameters: of the model, tables left out (`ml.plan.step_law.non_embedding_parameters`).
      batch_tokens: of one step.
      steps: numbers of the steps at which losses are known, the warm-up's left out.
      losses: in nats per token, of text not seen before (in a single pass over the data the training loss is).
    """

    parameters: float
    batch_tokens: float
    steps: tuple[float, ...]
    losses: tuple[float, ...]

    def __post_init__(self):
        if len(self.steps) != len(self.losses) or not self.steps:
            raise ValueError("steps and losses must be of one length, and not empty")
        if min(*self.steps, *self.losses, self.parameters, self.batch_tokens) <= 0:
            raise ValueError("parameters, batch_tokens, steps and losses must be positive")


@dataclasses.dataclass(frozen=True)
class LossCurve:
    """The fitted constants and what follows from them.

    Attributes:
      a_n, n_c: of the loss that a size converges to, ``(n_c / N)^a_n``.
      a_b, b_0: of the critical batch, in tokens, ``b_0 / L^(1 / a_b)``.
      a_s, s_c: of the loss that more steps take off, ``(s_c / Smin)^a_s``.
      residuals: ``ln(measured / fitted)`` of each curve's points, in the order of the curves.
      samples: the six constants of each bootstrap fit, which draws whole curves.
    """

    a_n: float
    n_c: float
    a_b: float
    b_0: float
    a_s: float
    s_c: float
    residuals: tuple[tuple[float, ...], ...] = ()
    samples: tuple[tuple[float, ...], ...] = ()

    @property
    def constants(self) -> tuple[float, ...]:
        """In the order of `NAMES`."""
        return tuple(getattr(self, name) for name in NAMES)

    @property
    def rms_residual(self) -> float:
        """Root mean square of the residuals: 0.01 is one percent of the loss."""
        return float(np.sqrt(np.mean(np.square(np.concatenate(self.residuals)))))

    def interval(self, name: str, share: float = 0.95) -> tuple[float, float]:
        """Bounds of a constant that hold ``share`` of the bootstrap fits.

        Raises:
          ValueError: fitted without a bootstrap.
        """
        return self._bounds([sample[NAMES.index(name)] for sample in self.samples], share)

    def converged(self, parameters: float) -> float:
        """The loss of a size after any number of steps."""
        return (self.n_c / parameters) ** self.a_n

    def critical_batch(self, loss: float) -> float:
        """The batch, in tokens, at which reaching ``loss`` takes twice the fewest steps and twice the fewest tokens."""
        return self.b_0 / loss ** (1 / self.a_b)

    def steps_to(self, loss: float, parameters: float, batch_tokens: float) -> float:
        """Steps until a loss is reached; infinite if it never is."""
        rest = loss - self.converged(parameters)
        if rest <= 0:
            return math.inf
        return self.s_c / rest ** (1 / self.a_s) * (1 + self.critical_batch(loss) / batch_tokens)

    def predict(self, parameters: float, batch_tokens: float, steps: Sequence[float]) -> Float[np.ndarray, "steps"]:
        """The losses after these numbers of steps."""
        x = np.broadcast_to(np.array([parameters, batch_tokens])[:, None], (2, len(steps)))
        return np.exp(_log_loss(_logs(self.constants), np.vstack([x, np.asarray(steps, float)])))

    def predicted_interval(
        self, parameters: float, batch_tokens: float, steps: float, share: float = 0.95
    ) -> tuple[float, float]:
        """Bounds of one predicted loss, over the bootstrap.

        Raises:
          ValueError: fitted without a bootstrap.
        """
        fits = map(_law, self.samples)
        return self._bounds([float(fit.predict(parameters, batch_tokens, [steps])[0]) for fit in fits], share)

    def _bounds(self, values: list[float], share: float) -> tuple[float, float]:
        if not values:
            raise ValueError("intervals need a bootstrap; fit with bootstrap=100")
        low, high = np.quantile(values, [(1 - share) / 2, (1 + share) / 2])
        return float(low), float(high)


def fit(curves: Sequence[Curve], *, bootstrap: int = 100, seed: int = 0) -> LossCurve:
    """Fits the constants.

    First in the paper's order (sizes at their lowest loss, then the critical batch at levels of the loss, then the
    steps), which asks for runs near convergence; from there all constants at once, by least squares on the logarithm of
    the loss, which does not.

    Args:
      curves: of several sizes, and of at least one size at several batches.
      bootstrap: fits to curves drawn with replacement. Curves are drawn whole, since neighbouring points share noise.
      seed: of the draws.

    Raises:
      ValueError: fewer than two sizes, or no size with two batches or more.
    """
    if not _enough(curves):
        raise ValueError("curves of at least two sizes are needed, and one size at several batch_tokens")
    x, y, lengths = _points(curves)
    best = _refined(_staged(curves), x, y)
    residuals = np.split(y - _log_loss(best, x), np.cumsum(lengths)[:-1])
    rng = np.random.default_rng(seed)
    samples: list[tuple[float, ...]] = []
    while len(samples) < bootstrap:
        drawn = [curves[i] for i in rng.integers(len(curves), size=len(curves))]
        if _enough(drawn):
            samples.append(_constants(_refined(best, *_points(drawn)[:2])))
    return dataclasses.replace(
        _law(_constants(best)),
        residuals=tuple(tuple(part.tolist()) for part in residuals),
        samples=tuple(samples),
    )


def read_curve(workdir: str | os.PathLike[str], *, after_step: int) -> Curve:
    """The curve of a run of `scripts/train.py`, from its work directory.

    Args:
      workdir: of the run, whose learning rate should have stayed constant after the warm-up.
      after_step: steps up to this one, such as the warm-up's, are left out.

    Raises:
      UserError: the folder is of no run, or the run has not come further than ``after_step``.
    """
    folder = Workdir(workdir)
    rows = [row for row in read_metrics(folder.metrics) if row["step"] > after_step and math.isfinite(row["loss"])]
    if not rows:
        raise UserError(f"{folder.metrics} has no loss after step {after_step}; train longer")
    return Curve(
        parameters=non_embedding_parameters(folder.read_config().model),
        batch_tokens=float(np.mean([row["tokens"] for row in rows])),
        steps=tuple(float(row["step"]) for row in rows),
        losses=tuple(row["loss"] for row in rows),
    )


def critical_batch(batch_tokens: Sequence[float], steps: Sequence[float]) -> tuple[float, float]:
    """``(Bc, Smin)`` of runs that reached one and the same loss: the hyperbola ``S = Smin (1 + Bc / B)``.

    Fitted to logarithms, so that each run counts with its relative error (McCandlish et al. 2018, equation 5.1).

    Args:
      batch_tokens: of each run; at least two that differ. In any unit, which is then that of ``Bc``.
      steps: that each took.

    Raises:
      ValueError: too few runs.
    """
    b, s = np.asarray(batch_tokens, float), np.asarray(steps, float)
    if len(set(b.tolist())) < 2 or len(b) != len(s):
        raise ValueError("runs with at least two different batches are needed")

    def error(logs: np.ndarray) -> np.ndarray:
        return logs[1] + np.log1p(np.exp(logs[0]) / b) - np.log(s)

    start = [float(np.mean(np.log(b))), math.log(s.min())]
    found = optimize.least_squares(error, start, loss="soft_l1", f_scale=0.1).x
    return math.exp(found[0]), math.exp(found[1])


def _law(constants: Sequence[float]) -> LossCurve:
    a_n, n_c, a_b, b_0, a_s, s_c = constants
    return LossCurve(a_n, n_c, a_b, b_0, a_s, s_c)


def _enough(curves: Sequence[Curve]) -> bool:
    pairs = {(curve.parameters, curve.batch_tokens) for curve in curves}
    sizes = {size for size, _ in pairs}
    return len(sizes) >= 2 and len(pairs) > len(sizes)


def _points(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """``[3, points]`` of parameters, batch and step; logarithms of the losses; points of each curve."""
    lengths = [len(curve.steps) for curve in curves]
    columns = [[c.parameters, c.batch_tokens, step] for c in curves for step in c.steps]
    return np.array(columns, float).T, np.log([loss for c in curves for loss in c.losses]), lengths


# Constants are sought by their logarithms, and with every power law written around a point: ``(n_c / N)^a_n`` as
# ``exp(a_n (ln n_c - ln N))``. The six numbers are ln a_n, ln n_c, ln a_b, ln b_0, ln a_s, ln s_c.


def _logs(constants: Sequence[float]) -> np.ndarray:
    return np.log(np.asarray(constants, float))


def _constants(logs: np.ndarray) -> tuple[float, ...]:
    return tuple(np.exp(logs).tolist())


def _terms(logs: np.ndarray, x: np.ndarray, log_loss: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What size and steps add to a loss, and ``Bc(L) / B``."""
    a_n, n_c, a_b, b_0, a_s, s_c = logs
    ratio = np.exp(np.clip(b_0 - log_loss / np.exp(a_b) - np.log(x[1]), -60, 60))
    size = np.exp(np.exp(a_n) * (n_c - np.log(x[0])))
    steps = np.exp(np.exp(a_s) * (s_c + np.log1p(ratio) - np.log(x[2])))
    return size, steps, ratio


def _log_loss(logs: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Solves the trajectory's equation for ``ln L``: its right side falls with ``L``, so there is one solution."""
    size = np.exp(np.exp(logs[0]) * (logs[1] - np.log(x[0])))
    low, high = np.log(size), np.full(x.shape[1], 12.0)  # no loss is as high as e^12
    low = np.minimum(low, high)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        size, steps, _ = _terms(logs, x, middle)
        above = size + steps > np.exp(middle)
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    found = (low + high) / 2
    for _ in range(_NEWTON):
        size, steps, ratio = _terms(logs, x, found)
        slope = np.exp(found) + steps * np.exp(logs[4] - logs[2]) * ratio / (1 + ratio)
        found = np.clip(found - (np.exp(found) - size - steps) / slope, low, high)
    return found


def _jacobian(logs: np.ndarray, x: np.ndarray, log_loss: np.ndarray) -> np.ndarray:
    """Of ``ln L`` by the six numbers, ``[points, 6]``, by differentiating the equation it solves."""
    exponents = np.exp(logs[::2])
    size, steps, ratio = _terms(logs, x, log_loss)
    of_ratio = steps * exponents[2] * ratio / (1 + ratio)  # d(right side) / d ln(ratio)
    columns = [
        size * np.log(size),
        size * exponents[0],
        of_ratio * log_loss / exponents[1],
        of_ratio,
        steps * np.log(steps),
        steps * exponents[2],
    ]
    return np.column_stack(columns) / (np.exp(log_loss) + of_ratio / exponents[1])[:, None]


def _refined(start: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """All constants at once. A soft loss: one spike of a run must not bend the law."""
    found = optimize.least_squares(
        lambda logs: _log_loss(logs, x) - y,
        start,
        jac=lambda logs: _jacobian(logs, x, _log_loss(logs, x)),
        x_scale="jac",
        loss="soft_l1",
        f_scale=0.05,
        bounds=(start - 12, start + 12),
    )
    return found.x


def _staged(curves: Sequence[Curve]) -> np.ndarray:
    """The paper's order of estimation: (1) sizes, (2) batches, (3) steps."""
    lowest: dict[float, float] = {}
    for curve in curves:
        lowest[curve.parameters] = min(lowest.get(curve.parameters, math.inf), *curve.losses)
    # (1) A run that has not converged lies above its asymptote; half of a percent keeps the difference positive below.
    slope, level = np.polyfit(np.log(list(lowest)), np.log(list(lowest.values())) - 0.005, 1)
    a_n = max(-slope, 1e-3)
    n_c = math.exp(level / a_n)

    # (2) Levels that several batches of one size have crossed.
    groups: dict[float, list[Curve]] = {}
    for curve in curves:
        groups.setdefault(curve.parameters, []).append(curve)
    points = []
    for group in groups.values():
        if len({curve.batch_tokens for curve in group}) < 2:
            continue
        top, bottom = min(max(c.losses) for c in group), max(min(c.losses) for c in group)
        for loss in np.geomspace(top, bottom, 8)[1:-1] if top > bottom else ():
            reached = [(c.batch_tokens, _crossing(c, loss)) for c in group]
            points.append((math.log(loss), math.log(critical_batch(*zip(*reached, strict=True))[0])))
    a_b, b_0 = 0.2, float(np.median([curve.batch_tokens for curve in curves]))
    if len(points) >= 2:
        levels, batches = np.array(points).T
        slope, log_b_0 = np.polyfit(levels, np.clip(batches, *np.quantile(batches, [0.1, 0.9])), 1)
        a_b = 1 / max(-slope, 0.1)
        b_0 = math.exp(log_b_0) if slope < 0 else math.exp(float(np.median(batches + levels / a_b)))

    # (3) Steps as if the batch were infinite, against what the size does not explain.
    x, y, _ = _points(curves)
    rest = np.exp(y) - np.exp(a_n * (math.log(n_c) - np.log(x[0])))
    minimal = x[2] / (1 + b_0 / np.exp(y / a_b) / x[1])
    above = rest > 0.02 * np.exp(y)
    a_s, s_c = 0.7, float(np.median(minimal))
    if above.sum() >= 2:
        slope, level = np.polyfit(np.log(minimal[above]), np.log(rest[above]), 1)
        a_s = max(-slope, 0.05)
        s_c = math.exp(level / a_s)
    return _logs([a_n, n_c, a_b, b_0, a_s, s_c])


def _crossing(curve: Curve, loss: float) -> float:
    """The step at which a curve first falls to ``loss``, between its points."""
    steps, losses = np.array(curve.steps), np.minimum.accumulate(curve.losses)
    return float(np.exp(np.interp(-loss, -losses, np.log(steps))))
