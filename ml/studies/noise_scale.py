"""Gradient noise scale: estimated from one run's microbatches, against the critical batch of a brute-force sweep.

McCandlish et al. 2018: the simple noise scale, ``tr(Sigma) / |G|^2``, predicts the batch size at which a run needs
twice the fewest steps and twice the fewest examples for a loss. The sweep finds that batch from steps to the loss at
many batch sizes, each at the best of several learning rates; the estimate takes one run (`ml.train.noise_scale`). The
noise scale grows while the loss falls, and the steps to a loss depend on all of it on the way there: compared is that
of all steps of a run at a large batch, their mean ``tr(Sigma)`` over their mean ``|G|^2`` (as in
`ml.train.noise_scale.SmoothedNoiseScale`: a mean of ratios would be that of a denominator that may come close to zero).
The one at the loss itself is kept beside it: it is larger.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ml.models import TransformerConfig
from ml.optim import OptimizerConfig, ScheduleConfig
from ml.plan.loss_curve import critical_batch
from ml.studies.batch_sweep import tune
from ml.studies.byte_text import byte_rows
from ml.studies.byte_training import Stage, byte_model, make_byte_curve
from ml.studies.outcome import Budget, Measured, Outcome, Panel, Series, related
from ml.studies.steps_to_loss import smoothed, steps_to
from ml.train.reporting.progress import ProgressDisplay

_FACTOR = 2.0


@dataclasses.dataclass(frozen=True)
class Setting:
    """How large the study is.

    Attributes:
      model: the transformer.
      optimizer: at a constant rate after ``warmup_steps``.
      rate: where the search for the best rate begins, at ``probe_batch``; elsewhere scaled by the square root.
      target: loss to reach, in nats per byte.
      steps: at most, for each batch size in rows.
      probe_batch: rows of the run that estimates, in ``probe_parts`` microbatches.
      seeds: of parameters and order.
    """

    model: TransformerConfig
    optimizer: str
    rate: float
    warmup_steps: int
    target: float
    steps: Mapping[int, int]
    probe_batch: int
    probe_parts: int
    seeds: tuple[int, ...] = (1, 2, 3)


SETTINGS: Mapping[Budget, Setting] = {
    "cpu": Setting(
        model=byte_model(num_layers=1, embed_dim=32, num_heads=2, length=32),
        optimizer="adamw",
        rate=0.02,
        warmup_steps=10,
        target=2.2,
        steps={2: 1600, 8: 700, 32: 350, 128: 250},
        probe_batch=128,
        probe_parts=8,
    ),
    "gpu": Setting(
        model=byte_model(num_layers=4, embed_dim=256, num_heads=4, length=128),
        optimizer="adamw",
        rate=0.002,
        warmup_steps=20,
        target=1.8,
        steps={4: 20_000, 16: 10_000, 64: 5000, 256: 2500, 1024: 1200},
        probe_batch=1024,
        probe_parts=8,
    ),
}


def run(budget: Budget) -> Outcome:
    """See the module's docstring."""
    return study(SETTINGS[budget])


@dataclasses.dataclass(frozen=True)
class Found:
    """What the runs gave.

    Attributes:
      steps: to the target, by batch size in rows, one for each seed.
      rates: the best for each batch size, of those that were tried.
      noise: the noise scale in tokens, of all steps to the target, one for each seed.
      noise_at_target: around the target alone.
    """

    steps: Mapping[int, tuple[float, ...]]
    rates: Mapping[int, float]
    noise: tuple[float, ...]
    noise_at_target: tuple[float, ...]


def study(setting: Setting) -> Outcome:
    """Sweeps, estimates and judges."""
    return judge(setting, measure(setting))


def measure(setting: Setting) -> Found:
    """All runs."""
    length, sizes = setting.model.max_length, setting.steps
    rows, _ = byte_rows(max(size * steps for size, steps in sizes.items()), 1, length)
    steps: dict[int, tuple[float, ...]] = {}
    rates: dict[int, float] = {}
    noise: list[float] = []
    at_target: list[float] = []
    with ProgressDisplay(len(sizes) + 1) as progress, ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, (size, most) in enumerate(sizes.items(), 1):
            curve = _curve(setting, Stage(rows[: size * most], size))

            def to_target(rate: float, seed: int, curve: Callable = curve, most: int = most) -> float:
                return min(steps_to(curve(rate, seed)["loss"], setting.target), 10.0 * most)

            first = setting.rate * math.sqrt(size / setting.probe_batch)
            candidates, cached = [first / 2, first, 2 * first], functools.cache(to_target)
            list(pool.map(cached, candidates, [0] * len(candidates)))  # at the same time
            tried = tune(cached, candidates, (0,))
            rates[size] = min(tried, key=tried.__getitem__)
            steps[size] = tuple(pool.map(to_target, [rates[size]] * len(setting.seeds), setting.seeds))
            tokens = size * most * length
            progress.update(done, loss=setting.target, tokens=tokens)
        size = setting.probe_batch
        stage = Stage(rows[: size * sizes[size]], size)
        curve = _curve(setting, stage, microbatches=setting.probe_parts, noise_scale=True)
        for metrics in pool.map(curve, [rates[size]] * len(setting.seeds), setting.seeds):
            variance, signal = metrics["noise_variance"], metrics["noise_signal"]
            reached = round(min(steps_to(metrics["loss"], setting.target), len(signal)))
            noise.append(float(variance[:reached].mean()) / float(signal[:reached].mean()))
            at_target.append(float((smoothed(variance) / smoothed(signal))[reached - 1]))
        progress.update(len(sizes) + 1, loss=setting.target, tokens=0)
    return Found(steps, rates, tuple(noise), tuple(at_target))


def _curve(setting: Setting, stage: Stage, **train: Any) -> Callable[[float, int], dict[str, np.ndarray]]:
    schedule = ScheduleConfig(kind="constant", warmup_steps=setting.warmup_steps)
    return make_byte_curve(setting.model, OptimizerConfig(setting.optimizer, 1.0), schedule, stage, **train)


def judge(setting: Setting, found: Found) -> Outcome:
    """What the numbers say of the claim."""
    length = setting.model.max_length
    tokens = [size * length for size in found.steps]
    fits = [critical_batch(tokens, [found.steps[size][i] for size in found.steps]) for i in range(len(setting.seeds))]
    swept = Measured("sweep", tuple(batch for batch, _ in fits))
    ours = Measured("noise scale", found.noise)
    holds = related(ours.mean, "~", swept.mean, _FACTOR - 1)
    return Outcome(
        paper="An Empirical Model of Large-Batch Training (McCandlish et al. 2018)",
        url="https://arxiv.org/abs/1812.06162",
        have="The noise scale measured while training (`ml/train/noise_scale.py`), `scripts/advise.py --measure`",
        claim="The gradient's noise scale, from the microbatches of one run, agrees with the critical batch of a "
        "brute-force sweep within a factor of 2",
        setup=_setup(setting, float(np.mean(found.noise_at_target))),
        baseline=swept,
        ours=ours,
        unit="tokens",
        relation="~",
        tolerance=_FACTOR - 1,
        holds=holds,
        seeds=setting.seeds,
        reason="" if holds else _reason(setting, ours.mean / swept.mean),
        panels=(_panel(tokens, found, fits, ours.mean),),
        details={
            "steps_to_loss": {str(size): list(steps) for size, steps in found.steps.items()},
            "rates": {str(size): rate for size, rate in found.rates.items()},
            "noise_scale_at_target": list(found.noise_at_target),
            "fewest_steps": [fewest for _, fewest in fits],
        },
    )


def _setup(setting: Setting, at_target: float) -> str:
    model, length = setting.model, setting.model.max_length
    sizes = ", ".join(f"{size * length:,}" for size in setting.steps)
    return (
        f"A transformer of {model.num_layers} x {model.embed_dim} reads rows of {length} bytes of the standard "
        f"library's source until its smoothed training loss (a single pass) is {setting.target} nats per byte: "
        f"{setting.optimizer} at a constant rate, tuned for each batch in steps of two with another seed, at batches "
        f"of {sizes} tokens. The sweep's critical batch is that of steps = fewest * (1 + critical / batch); the noise "
        f"scale is that of all steps to that loss (mean variance over mean squared gradient), at "
        f"{setting.probe_batch * length:,} tokens in {setting.probe_parts} microbatches (at the loss itself it is "
        f"{at_target:,.0f}). Holds if the means over "
        "seeds agree within a factor of 2."
    )


def _reason(setting: Setting, ratio: float) -> str:
    text = f"the noise scale is {ratio:.2g} times the critical batch"
    if setting.optimizer == "sgd":
        return text
    return (
        f"{text}; its theory is that of plain gradient descent, and does not know how {setting.optimizer} scales steps"
    )


def _panel(tokens: Sequence[int], found: Found, fits: Sequence[tuple[float, float]], noise: float) -> Panel:
    x = tuple(map(float, tokens))
    values = [np.array(steps) for steps in found.steps.values()]
    points = Series(
        "measured", x, tuple(float(v.mean()) for v in values), tuple(float(v.std(ddof=1)) for v in values), True
    )
    fewest = float(np.mean([f for _, f in fits]))
    critical = float(np.mean([c for c, _ in fits]))
    fine = np.geomspace(x[0], x[-1], 50)

    def line(name: str, batch: float) -> Series:
        return Series(name, tuple(fine.tolist()), tuple((fewest * (1 + batch / fine)).tolist()))

    series = (points, line("fitted to the sweep", critical), line("with the noise scale instead", noise))
    return Panel("batch size (tokens)", "steps to the loss", series, x_log=True, y_log=True)
