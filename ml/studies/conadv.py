"""Concurrent adversarial training (ConAdv) makes up for what a large batch loses, as sequential attacks do.

A small residual network learns handwritten digits with LARS. The rate is tuned without attacks, at the small batch and
again at the large one, where the square root's rule may be too much. At the large batch four trainings are compared:
clean; with pixels moved at random (the control, which costs as much but knows nothing); attacked by the present weights
(DisAdv); attacked by the weights of the step before (ConAdv).
"""

import dataclasses
import statistics
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from ml.models import ResNetConfig
from ml.optim import OptimizerConfig, ScheduleConfig
from ml.studies.batch_sweep import clearly_less, tune
from ml.studies.digits_training import Reading, digits, digits_model, make_digits_training
from ml.studies.outcome import Budget, Measured, Outcome, Panel, Series
from ml.train.reporting.progress import ProgressDisplay

METHODS = {"none": "clean", "noise": "random signs", "sequential": "DisAdv", "concurrent": "ConAdv"}
_RATE_FACTORS = (0.5, 1.0, 2.0)


@dataclasses.dataclass(frozen=True)
class Setting:
    """How large the study is.

    Attributes:
      model: the network.
      train_images: how many there are.
      epochs: passes over them.
      small, large: batch sizes, in images.
      rate: where the search for the best rate begins, at the small batch.
      attack: how far pixels are moved, in [0, 1].
      warmup_steps: at both batch sizes.
      seeds: of parameters and order.
      tuning_seeds: a rate is judged by its mean loss over these.
      weight_decay: of LARS.
    """

    model: ResNetConfig
    train_images: int
    epochs: int
    small: int
    large: int
    rate: float
    attack: float = 0.1
    warmup_steps: int = 5
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    tuning_seeds: tuple[int, ...] = (11, 12)
    weight_decay: float = 0.01


SETTINGS: Mapping[Budget, Setting] = {
    "cpu": Setting(digits_model(8, (1, 1)), train_images=512, epochs=100, small=32, large=512, rate=0.02),
    "gpu": Setting(digits_model(32, (2, 2, 2)), train_images=1024, epochs=200, small=32, large=1024, rate=0.02),
}


@dataclasses.dataclass(frozen=True)
class Found:
    """What came out.

    Attributes:
      rate: tuned at the small batch.
      losses: by rate, there.
      large_rate: tuned at the large batch, before the schedule scales it by the square root of the batch.
      small: accuracies of clean training at the small batch, by seed.
      accuracies: at the large batch, by method.
      seconds: of a step at the large batch, by method, on this machine.
    """

    rate: float
    losses: Mapping[float, float]
    large_rate: float
    small: tuple[float, ...]
    accuracies: Mapping[str, tuple[float, ...]]
    seconds: Mapping[str, float]


def run(budget: Budget) -> Outcome:
    """See the module's docstring."""
    return study(SETTINGS[budget])


def study(setting: Setting) -> Outcome:
    """Tunes, trains and judges."""

    def make(batch_size: int, adversarial: str) -> Any:
        schedule = ScheduleConfig(
            kind="linear", warmup_steps=setting.warmup_steps, batch_scaling="sqrt", base_batch_size=setting.small
        )
        optimizer = OptimizerConfig("lars", learning_rate=1.0, weight_decay=setting.weight_decay)
        reading = Reading(batch_size, setting.epochs, setting.train_images)
        attacked = {"adversarial": adversarial, "adversarial_step": setting.attack}
        return make_digits_training(setting.model, optimizer, schedule, reading, **attacked)

    images, steps = setting.train_images * setting.epochs, setting.train_images * setting.epochs // setting.large
    runs = 2 * len(_RATE_FACTORS) * len(setting.tuning_seeds) + (1 + len(METHODS)) * len(setting.seeds)
    with ProgressDisplay(runs, unit="images") as progress:
        done = 0

        def counted(training: Any, rate: float, seed: int) -> Mapping[str, float]:
            nonlocal done
            figures, done = training(rate, seed), done + 1
            progress.update(done, loss=figures["loss"], tokens=images)
            return figures

        def tuned(training: Any, around: float) -> dict[float, float]:
            rates = [around * factor for factor in _RATE_FACTORS]
            return tune(lambda rate, seed: counted(training, rate, seed)["loss"], rates, setting.tuning_seeds)

        clean = make(setting.small, "none")
        losses = tuned(clean, setting.rate)
        rate = min(losses, key=losses.__getitem__)
        large_losses = tuned(make(setting.large, "none"), rate / 2)
        large_rate = min(large_losses, key=large_losses.__getitem__)
        small = tuple(counted(clean, rate, seed)["accuracy"] for seed in setting.seeds)
        accuracies, seconds = {}, {}
        for method in METHODS:
            training = make(setting.large, method)
            found, times = [], []
            for seed in setting.seeds:
                began = time.perf_counter()
                found.append(counted(training, large_rate, seed)["accuracy"])
                times.append(time.perf_counter() - began)
            accuracies[method] = tuple(found)
            seconds[method] = statistics.median(times[1:]) / steps  # the first one compiles
    return judge(setting, Found(rate, losses, large_rate, small, accuracies, seconds))


def judge(setting: Setting, found: Found) -> Outcome:
    """What the accuracies say of the claim."""
    ours = np.array(found.accuracies["concurrent"])
    unbeaten = [name for name in ("none", "noise") if not clearly_less(np.array(found.accuracies[name]), ours)]
    nearest = max(("none", "noise"), key=lambda name: statistics.fmean(found.accuracies[name]))
    return Outcome(
        paper="Concurrent Adversarial Learning for Large-Batch Training (Liu et al. 2021)",
        url="https://arxiv.org/abs/2106.00221",
        have="concurrent and sequential attacks with split batch norm (`ml/train/conadv.py`, "
        "`config.train.adversarial`)",
        claim=f"At batch {setting.large} training with concurrent attacks is more accurate than clean training and "
        "than training on images moved at random",
        setup=_setup(setting, found),
        baseline=Measured(METHODS[nearest], found.accuracies[nearest]),
        ours=Measured(METHODS["concurrent"], found.accuracies["concurrent"]),
        unit=f"share of held-out images classified rightly, at batch {setting.large}",
        relation=">",
        holds=not unbeaten,
        seeds=setting.seeds,
        reason="; ".join(_objection(name, found) for name in unbeaten),
        panels=_panels(setting, found),
        details={
            "rate": found.rate,
            "large_rate": found.large_rate,
            "loss_by_rate": {f"{rate:.6g}": loss for rate, loss in found.losses.items()},
            "accuracy_small_batch": list(found.small),
            "accuracy": {METHODS[name]: list(values) for name, values in found.accuracies.items()},
            "seconds_per_step": {METHODS[name]: value for name, value in found.seconds.items()},
        },
    )


def _setup(setting: Setting, found: Found) -> str:
    heldout = int(digits()[1]["loss_mask"].sum())
    times = {name: found.seconds[name] / found.seconds["none"] for name in ("sequential", "concurrent")}
    disadv, conadv = (statistics.fmean(found.accuracies[name]) for name in ("sequential", "concurrent"))
    return (
        f"A residual network of {sum(setting.model.blocks)} blocks from {setting.model.width} channels on reads "
        f"{setting.train_images} of scikit-learn's digits {setting.epochs} times with LARS, in batches of "
        f"{setting.large}; attacks move pixels by {setting.attack}. Its rate is tuned on clean images, at batch "
        f"{setting.small}, where it reaches {statistics.fmean(found.small):.3f}, and anew at batch {setting.large}. "
        f"Counted are {heldout} other digits. DisAdv reaches {disadv:.3f}, ConAdv {conadv:.3f}. Holds if ConAdv is "
        "above both others by more than two standard errors of the difference, paired by seed. A step took "
        f"{times['sequential']:.2f} times a clean one's time with DisAdv, {times['concurrent']:.2f} with ConAdv: one "
        "device does the same work for both, so this says nothing of two workers that share it, which is the paper's "
        "claim of speed; that neither gradient waits for the other is tested on the traced program."
    )


def _objection(name: str, found: Found) -> str:
    theirs, ours = (statistics.fmean(found.accuracies[key]) for key in (name, "concurrent"))
    how = "is as accurate or more" if theirs >= ours else "cannot be told from ConAdv"
    images = {"none": "clean images", "noise": "images moved at random"}[name]
    return f"training on {images} {how} ({theirs:.3f} against {ours:.3f})"


def _panels(setting: Setting, found: Found) -> tuple[Panel, ...]:
    def point(name: str, x: int, values: tuple[float, ...]) -> Series:
        return Series(name, (float(x),), (statistics.fmean(values),), (statistics.stdev(values),), marks_only=True)

    series = [point(f"clean, batch {setting.small}", 0, found.small)]
    series += [point(title, i, found.accuracies[name]) for i, (name, title) in enumerate(METHODS.items(), 1)]
    return (Panel("training", "held-out accuracy", tuple(series), title=f"batch {setting.large}"),)
