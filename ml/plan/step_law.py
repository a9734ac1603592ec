"""Step Law: the best peak learning rate and batch size of language-model pre-training, as power laws of size and data.

Source: Li et al. 2025, "Predictable Scale, Part I: Optimal Hyperparameter Scaling Law in Large Language Model
Pretraining". The constants hold under its conditions (`CONDITIONS`); `fit` makes them anew from runs of one's own.
"""

import dataclasses
import math
import warnings
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from ml.models import TransformerConfig
from ml.models.cost import parameter_count

CONDITIONS = "AdamW (0.9, 0.95), weight decay 0.1, clipping at 1, cosine decay to a final learning rate of 1e-5"
FINAL_LEARNING_RATE = 1e-5
"""Where the cosine of the law's runs ends, whatever the peak: with another end the best peak is another."""

# A 95% interval of a normal distribution, in standard deviations.
_Z = 1.96
# The loss is flat around its minimum: runs this close to a cell's best count as best, too.
_NEAR_BEST = 0.0025


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a law says at one point.

    Attributes:
      value: the estimate.
      low, high: 95% interval of the law's own uncertainty, from the bootstrap. How far a single run may stray from the
        law is not in it.
      outside: what lies outside of the range that the law was fitted in, one text each; empty: nothing does.
    """

    value: float
    low: float
    high: float
    outside: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """``y = exp(level) * prod_i (x_i / center_i) ^ exponent_i``, and how sure that is.

    Attributes:
      name: what ``y`` is.
      inputs: names of the ``x``.
      center: of the runs behind the fit; there ``y`` is known best.
      level: ``ln y`` at the center.
      exponents: one for each input.
      covariance: of ``(level, *exponents)``, over bootstrap fits.
      ranges: smallest and largest of each input among those runs.
    """

    name: str
    inputs: tuple[str, ...]
    center: tuple[float, ...]
    level: float
    exponents: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...]
    ranges: tuple[tuple[float, float], ...]

    @property
    def factor(self) -> float:
        """``y`` where all inputs are 1: the constant in front of the formula as papers print it."""
        return math.exp(self.level - sum(e * math.log(c) for e, c in zip(self.exponents, self.center, strict=True)))

    def at(self, *inputs: float) -> Estimate:
        """The law's value and interval.

        Raises:
          ValueError: an input that is not positive.
        """
        for name, value in zip(self.inputs, inputs, strict=True):
            if not value > 0:
                raise ValueError(f"{name}={value} must be positive")
        distance = np.array([1.0, *(math.log(x / c) for x, c in zip(inputs, self.center, strict=True))])
        mean = float(distance @ np.array([self.level, *self.exponents]))
        error = _Z * math.sqrt(max(0.0, float(distance @ np.array(self.covariance) @ distance)))
        outside = tuple(
            f"{name}={value:.3g} is outside of {low:.3g} to {high:.3g}, where the law for the {self.name} was fitted"
            for name, value, (low, high) in zip(self.inputs, inputs, self.ranges, strict=True)
            if not low * (1 - 1e-9) <= value <= high * (1 + 1e-9)
        )
        return Estimate(math.exp(mean), math.exp(mean - error), math.exp(mean + error), outside)


@dataclasses.dataclass(frozen=True)
class StepLaw:
    """The pair of laws.

    Attributes:
      peak_lr: of the number of parameters outside of the tables (`non_embedding_parameters`) and of training tokens.
      batch_tokens: of the number of training tokens alone.
      notes: what should be known about the runs behind it.
    """

    peak_lr: PowerLaw
    batch_tokens: PowerLaw
    notes: tuple[str, ...] = ()


_PARAMETERS, _TOKENS = (2.1e8, 1.07e9), (4e9, 1e11)  # the 17 (N, D) cells of the published table of dense runs
_CELLS = 17


def _published(name: str, factor: float, exponents: dict[str, tuple[float, float]], grid_step: float) -> PowerLaw:
    """A law from its published coefficients, whose bootstrap standard deviations are known one by one.

    Fitted slopes and level are uncorrelated at the center of the runs, so the deviations of the exponents act from
    there. That of the level is not published; an optimum on a grid is known to a step over the root of 12, and the
    level is the mean over cells.
    """
    ranges = {"parameters": _PARAMETERS, "tokens": _TOKENS}
    center = tuple(math.sqrt(math.prod(ranges[key])) for key in exponents)
    slopes = tuple(slope for slope, _ in exponents.values())
    deviations = (math.log(grid_step) / math.sqrt(12 * _CELLS), *(deviation for _, deviation in exponents.values()))
    return PowerLaw(
        name=name,
        inputs=tuple(exponents),
        center=center,
        level=math.log(factor) + sum(s * math.log(c) for s, c in zip(slopes, center, strict=True)),
        exponents=slopes,
        covariance=tuple(tuple(row) for row in np.diag(np.square(deviations)).tolist()),
        ranges=tuple(ranges[key] for key in exponents),
    )


STEP_LAW = StepLaw(
    # Means and standard deviations of 1,000 bootstrap fits, as stored with the released code. The paper prints them
    # rounded: 1.79 N^-0.713 D^0.307 and 0.58 D^0.571.
    _published(
        "peak learning rate",
        math.exp(0.586),
        {"parameters": (-0.7129, 0.030), "tokens": (0.3075, 0.019)},
        grid_step=math.sqrt(2),
    ),
    _published("batch size", math.exp(-0.5435), {"tokens": (0.5709, 0.019)}, grid_step=2.0),
    notes=(f"found with {CONDITIONS}",),
)


def peak_lr(parameters: float, tokens: float) -> Estimate:
    """The published law's best peak learning rate; warns where it is not known to hold.

    Args:
      parameters: those of layers and norms (`non_embedding_parameters`).
      tokens: of the whole training.
    """
    return _warned(STEP_LAW.peak_lr.at(parameters, tokens))


def batch_tokens(tokens: float) -> Estimate:
    """The published law's best batch size, in tokens (not sequences); warns where it is not known to hold."""
    return _warned(STEP_LAW.batch_tokens.at(tokens))


def non_embedding_parameters(config: TransformerConfig) -> int:
    """The law's N: all parameters but the tables of tokens, positions and logits.

    Of a mixture of experts all experts count; the paper finds the law to hold there, its count could not be checked.
    """
    count = parameter_count(config)
    return count.total - count.embedding - (0 if config.tie_embeddings else config.embed_dim * config.vocab_size)


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished training.

    Attributes:
      parameters: outside of the tables.
      tokens: trained on.
      peak_lr: its learning rate.
      batch_tokens: its batch, in tokens.
      loss: at the end, smoothed or held out.
    """

    parameters: float
    tokens: float
    peak_lr: float
    batch_tokens: float
    loss: float


def fit(runs: Sequence[Run], *, near: float = _NEAR_BEST, bootstrap: int = 1000, seed: int = 0) -> StepLaw:
    """Fits both laws to a grid of runs, as the paper does.

    In every cell of equal ``(parameters, tokens)`` the runs within ``near`` of the cell's best loss are kept; their
    logarithms are regressed by ordinary least squares, the learning rate on both sizes, the batch on tokens alone; the
    coefficients are means over the bootstrap (which draws kept runs).

    Args:
      runs: a learning rate x batch grid in every cell; runs that diverged may be left out or have an infinite loss.
      near: kept are losses up to ``(1 + near)`` times the best.
      bootstrap: number of fits.
      seed: of the draws.

    Returns:
      The laws. Cells whose best run lies on the edge of their grid are named in ``notes``: the optimum may lie beyond.

    Raises:
      ValueError: too few different sizes to tell the exponents apart.
    """
    cells: dict[tuple[float, float], list[Run]] = {}
    for run in runs:
        if math.isfinite(run.loss):
            cells.setdefault((run.parameters, run.tokens), []).append(run)
    sizes = np.array([[1.0, math.log(n), math.log(d)] for n, d in cells]).reshape(-1, 3)
    if np.linalg.matrix_rank(sizes) < 3:
        raise ValueError(
            f"{len(cells)} cells of (parameters, tokens) do not tell the exponents apart; train at least two numbers "
            "of parameters and, with one of them, two numbers of tokens"
        )
    kept, notes = [], []
    for (n, d), cell in cells.items():
        best = min(cell, key=lambda run: run.loss)
        kept += [run for run in cell if run.loss <= best.loss * (1 + near)]
        edge = [name for name in ("peak_lr", "batch_tokens") if _on_edge(getattr(best, name), cell, name)]
        if edge:
            notes.append(
                f"parameters={n:.3g}, tokens={d:.3g}: the best run lies on the grid's edge, in {' and '.join(edge)}"
            )
    inputs = np.array([(run.parameters, run.tokens) for run in kept])
    rng = np.random.default_rng(seed)
    laws = [
        _fitted(name, columns, inputs[:, 2 - len(columns) :], y, bootstrap, rng)
        for name, columns, y in (
            ("peak learning rate", ("parameters", "tokens"), np.array([run.peak_lr for run in kept])),
            ("batch size", ("tokens",), np.array([run.batch_tokens for run in kept])),
        )
    ]
    return StepLaw(laws[0], laws[1], tuple(notes))


def _fitted(
    name: str,
    columns: tuple[str, ...],
    inputs: Float[np.ndarray, "runs inputs"],
    y: Float[np.ndarray, "runs"],
    bootstrap: int,
    rng: np.random.Generator,
) -> PowerLaw:
    logs, target = np.log(inputs), np.log(y)
    center = logs.mean(axis=0)
    design = np.column_stack([np.ones(len(logs)), logs - center])
    fits: list[np.ndarray] = []
    while len(fits) < bootstrap:
        drawn = rng.integers(len(target), size=len(target))
        solution, _, rank, _ = np.linalg.lstsq(design[drawn], target[drawn])
        if rank == design.shape[1]:  # a draw of too few sizes says nothing
            fits.append(solution)
    mean, covariance = np.mean(fits, axis=0), np.atleast_2d(np.cov(np.array(fits).T))
    return PowerLaw(
        name=name,
        inputs=columns,
        center=tuple(np.exp(center).tolist()),
        level=float(mean[0]),
        exponents=tuple(mean[1:].tolist()),
        covariance=tuple(tuple(row) for row in covariance.tolist()),
        ranges=tuple((float(low), float(high)) for low, high in zip(inputs.min(0), inputs.max(0), strict=True)),
    )


def _on_edge(value: float, cell: Sequence[Run], name: str) -> bool:
    tried = {getattr(run, name) for run in cell}
    return value in (min(tried), max(tried))


def _warned(estimate: Estimate) -> Estimate:
    for text in estimate.outside:
        warnings.warn(f"Step Law: {text}", stacklevel=3)
    return estimate
