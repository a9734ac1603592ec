"""What a study found: a paper's claim, how it was put to the test here, and whether it holds at this scale."""

import dataclasses
import math
import statistics
from collections.abc import Mapping
from typing import Any, Literal

Budget = Literal["cpu", "gpu"]
"""What a study may spend: about three minutes of two CPU cores, or about five of one GPU."""

Relation = Literal["<", ">", "~"]


@dataclasses.dataclass(frozen=True)
class Measured:
    """One side of a comparison.

    Attributes:
      name: what was measured, in a word or two: ``LAMB``, ``AdamW``, ``published``.
      values: one for each seed, in the order of `Outcome.seeds`; a single one where chance plays no part.
    """

    name: str
    values: tuple[float, ...]

    def __post_init__(self):
        if not self.values or not all(math.isfinite(value) for value in self.values):
            raise ValueError(f"{self.name}: values={self.values} must be finite; count a run that diverged as a number")

    @property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float:
        """The standard deviation over seeds (of the sample, so divided by ``n - 1``); 0 for a single value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0


@dataclasses.dataclass(frozen=True)
class Series:
    """A line of a plot.

    Attributes:
      name: in the legend.
      x, y: points, in the order in which they are joined.
      spread: half the height of each point's error bar; empty: none are drawn.
      marks_only: points that are not joined (measurements beside a fitted line).
    """

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    spread: tuple[float, ...] = ()
    marks_only: bool = False

    def __post_init__(self):
        if len(self.x) != len(self.y) or len(self.spread) not in (0, len(self.y)):
            raise ValueError(f"series {self.name!r}: x, y and spread must have one length")
        if not all(math.isfinite(value) for value in self.x + self.y + self.spread):
            raise ValueError(f"series {self.name!r} holds a value that is not finite")


@dataclasses.dataclass(frozen=True)
class Panel:
    """A plot; panels of one outcome stand side by side.

    Attributes:
      x_label, y_label: with units.
      series: at least one.
      title: above it.
      x_log, y_log: whether that axis is logarithmic (base 2 for ``x``).
    """

    x_label: str
    y_label: str
    series: tuple[Series, ...]
    title: str = ""
    x_log: bool = False
    y_log: bool = False

    def __post_init__(self):
        if not self.series:
            raise ValueError(f"panel {self.title!r} has no series")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A claim and what became of it; all that the table ``docs/papers.md`` and the plot are made from.

    A study may demand more than ``relation`` before it says that a claim holds (every seed, a margin, a second
    baseline: say so in ``setup``), never less: an outcome that contradicts its own numbers is refused.

    Attributes:
      paper: title and year, as in the table.
      have: what this project has of it, with its module: ``LAMB (ml/optim/lamb.py)``.
      claim: the paper's claim in the form that was tested, in one sentence.
      setup: model, data, budget and rule of decision, so that a reader can judge what the numbers mean.
      baseline: what the claim compares with: another method, a published number, a bound.
      ours: the method of the paper, as it is implemented here.
      unit: of both, such as ``nats per byte``.
      relation: how ``ours`` stands to ``baseline`` if the claim holds: below, above, or near
        (within a factor of ``1 + tolerance`` on either side, so 0.05 is 5 percent and 1.0 is a factor of two).
      holds: whether the claim holds here.
      seeds: that chance entered with: at least 3; empty where nothing is random.
      reason: why the claim does not hold at this scale; empty where it does.
      tolerance: for ``~``.
      panels: the plot.
      details: whatever else is worth keeping in the JSON file: settings, losses of single runs.
      url: of the paper.
    """

    paper: str
    have: str
    claim: str
    setup: str
    baseline: Measured
    ours: Measured
    unit: str
    relation: Relation
    holds: bool
    seeds: tuple[int, ...] = ()
    reason: str = ""
    tolerance: float = 0.0
    panels: tuple[Panel, ...] = ()
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    url: str = ""

    def __post_init__(self):
        if len(self.seeds) in (1, 2):
            raise ValueError(f"seeds={self.seeds}: where chance matters, 3 are the least; where not, give none")
        for side in (self.baseline, self.ours):
            if len(side.values) not in (1, len(self.seeds)):
                raise ValueError(f"{side.name}: {len(side.values)} values, but {len(self.seeds)} seeds")
        if (self.relation == "~") != (self.tolerance > 0):
            raise ValueError(f"tolerance={self.tolerance} goes with relation='~', and only with it")
        if self.holds and not related(self.ours.mean, self.relation, self.baseline.mean, self.tolerance):
            raise ValueError(f"holds, but not {self.ours.mean} {self.relation} {self.baseline.mean}")
        if self.holds == bool(self.reason):
            raise ValueError("give a reason where the claim does not hold, and only there; limits belong in setup")


def related(ours: float, relation: Relation, baseline: float, tolerance: float = 0.0) -> bool:
    """Whether ``ours relation baseline``; see `Outcome.relation`. What is only near must have the same sign."""
    if relation == "<":
        return ours < baseline
    if relation == ">":
        return ours > baseline
    if ours == baseline:
        return True
    return ours * baseline > 0 and max(ours / baseline, baseline / ours) <= 1 + tolerance
