"""Optimizers against batch sizes: rates tuned at the smallest batch, then every batch with several seeds."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ml.studies.outcome import Series
from ml.train.reporting.progress import ProgressDisplay

Training = Callable[[float, int], float]
"""``(learning rate, seed) -> held-out loss`` of one whole training."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is swept.

    Attributes:
      batch_sizes: ascending; rates are tuned at the first.
      rates: for each optimizer, where the search for its best rate begins.
      factors: of that beginning, ascending; the search goes on beyond them while the best rate is the outermost.
      seeds: of parameters and order.
      tuning_seeds: a rate is judged by its mean loss over these; none of ``seeds`` is among them, or the tuned batch
        would be flattered.
      ceiling: a loss above it, or none at all, counts as this much.
    """

    batch_sizes: tuple[int, ...]
    rates: Mapping[str, float]
    ceiling: float
    factors: tuple[float, ...] = (0.5, 1.0, 2.0)
    seeds: tuple[int, ...] = (1, 2, 3, 4)
    tuning_seeds: tuple[int, ...] = (11, 12, 13)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What came out.

    Attributes:
      plan: what was swept.
      losses: held-out, by optimizer and batch size, one for each seed.
      tuning: losses by optimizer and rate, at the smallest batch.
    """

    plan: Plan
    losses: Mapping[str, Mapping[int, tuple[float, ...]]]
    tuning: Mapping[str, Mapping[float, float]]

    def rate(self, optimizer: str) -> float:
        """The tuned rate, at the smallest batch."""
        return min(self.tuning[optimizer], key=self.tuning[optimizer].__getitem__)

    def lost(self, optimizer: str, batch_size: int | None = None) -> np.ndarray:
        """How much more loss there is at ``batch_size`` (default: the largest) than at the smallest, by seed."""
        sizes, losses = self.plan.batch_sizes, self.losses[optimizer]
        return np.subtract(losses[sizes[-1] if batch_size is None else batch_size], losses[sizes[0]])

    def mean(self, optimizer: str, batch_size: int) -> float:
        """The loss over seeds."""
        return statistics.fmean(self.losses[optimizer][batch_size])

    def series(self, optimizer: str, name: str, *, lost: bool = False) -> Series:
        """Loss, or loss since the smallest batch, over batch sizes."""
        sizes = self.plan.batch_sizes
        values = [self.lost(optimizer, b) if lost else np.array(self.losses[optimizer][b]) for b in sizes]
        y, spread = tuple(float(v.mean()) for v in values), tuple(float(v.std(ddof=1)) for v in values)
        return Series(name, tuple(map(float, sizes)), y, spread)

    def details(self) -> dict[str, object]:
        """All losses, as JSON takes them."""
        losses = {name: {str(b): list(values) for b, values in table.items()} for name, table in self.losses.items()}
        tuning = {name: {f"{rate:.6g}": loss for rate, loss in table.items()} for name, table in self.tuning.items()}
        return {"heldout_loss": losses, "loss_by_rate": tuning}


def sweep(plan: Plan, make_training: Callable[[str, int], Training], tokens: int) -> Sweep:
    """Tunes each optimizer at the smallest batch, then trains at every batch with every seed.

    Args:
      plan: what to sweep.
      make_training: ``(optimizer, batch size) -> training``; scaling the rate with the batch is its affair.
      tokens: that one training reads, for the progress bar.
    """
    losses: dict[str, dict[int, tuple[float, ...]]] = {}
    tuning: dict[str, dict[float, float]] = {}
    # A guess: a search may go further.
    runs = len(plan.factors) * len(plan.tuning_seeds) + len(plan.batch_sizes) * len(plan.seeds)
    with ProgressDisplay(len(plan.rates) * runs) as progress:
        counted = _Counted(progress, plan.ceiling, tokens)
        for name, rate in plan.rates.items():
            training = counted(make_training(name, plan.batch_sizes[0]))
            tuning[name] = tune(training, [rate * factor for factor in plan.factors], plan.tuning_seeds)
            best = min(tuning[name], key=tuning[name].__getitem__)
            losses[name] = {}
            for size in plan.batch_sizes:
                if size != plan.batch_sizes[0]:
                    training = counted(make_training(name, size))
                losses[name][size] = tuple(training(best, seed) for seed in plan.seeds)
    return Sweep(plan, losses, tuning)


def tune(training: Training, rates: Sequence[float], seeds: Sequence[int]) -> dict[float, float]:
    """Mean losses by rate: at ``rates`` (ascending), and outwards in steps of two while the best is the outermost."""

    def loss_at(rate: float) -> float:
        return statistics.fmean(training(rate, seed) for seed in seeds)

    losses = {rate: loss_at(rate) for rate in rates}
    while True:
        best = min(losses, key=losses.__getitem__)
        if best == min(losses):
            losses[best / 2] = loss_at(best / 2)
        elif best == max(losses):
            losses[best * 2] = loss_at(best * 2)
        else:
            return dict(sorted(losses.items()))


def clearly_less(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Whether ``ours`` lies below ``theirs`` by more than two standard errors of the difference, paired by seed."""
    difference = theirs - ours
    return bool(difference.mean() > 2 * difference.std(ddof=1) / math.sqrt(len(difference)))


class _Counted:
    """Makes trainings report to a progress bar, and count as the ceiling where they diverge."""

    def __init__(self, progress: ProgressDisplay, ceiling: float, tokens: int):
        self._progress, self._ceiling, self._tokens, self._done = progress, ceiling, tokens, 0

    def __call__(self, training: Training) -> Training:
        def counted(rate: float, seed: int) -> float:
            loss = training(rate, seed)
            loss = min(loss, self._ceiling) if math.isfinite(loss) else self._ceiling
            self._done += 1
            self._progress.update(self._done, loss=loss, tokens=self._tokens)
            return loss

        return counted
