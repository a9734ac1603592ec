"""Loss curves: constants fitted to small models predict the whole trajectory of a larger one.

Su et al. 2024, "Unraveling the Mystery of Scaling Laws: Part I". Small transformers of several widths read bytes at
several batch sizes; the six constants fitted to their curves (`ml.plan.loss_curve`) predict the curve of a wider one,
which is trained afterwards. The control predicts the widest small model's own curve at the same step and batch: what
one would say without a law of size.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ml.optim import OptimizerConfig, ScheduleConfig
from ml.plan.loss_curve import Curve, LossCurve, fit
from ml.plan.step_law import non_embedding_parameters
from ml.studies.byte_text import byte_rows
from ml.studies.byte_training import Stage, byte_model, make_byte_curve
from ml.studies.outcome import Budget, Measured, Outcome, Panel, Series
from ml.studies.steps_to_loss import smoothed
from ml.train.reporting.progress import ProgressDisplay

_BOUND = 5.0  # percent
_POINTS = 16


@dataclasses.dataclass(frozen=True)
class Setting:
    """How large the study is.

    Attributes:
      layers, length: of all models.
      widths: of the models that the constants are fitted to, ascending.
      held_out: width of the model that is predicted.
      steps: of each run, by batch size in rows.
      held_out_batches: batch sizes at which it is trained.
      rates: learning rates to choose from for each model and batch, ascending, at the smallest batch; elsewhere they
        grow with the square root of the batch.
      warmup_steps: then the rate is constant.
      first_step: where curves begin.
      seeds: of parameters and order; constants are fitted, and a curve predicted, for each.
    """

    layers: int
    length: int
    widths: tuple[int, ...]
    held_out: int
    steps: Mapping[int, int]
    held_out_batches: tuple[int, ...]
    rates: tuple[float, ...]
    warmup_steps: int
    first_step: int
    seeds: tuple[int, ...] = (1, 2, 3)


SETTINGS: Mapping[Budget, Setting] = {
    "cpu": Setting(
        layers=1,
        length=32,
        widths=(12, 20, 32),
        held_out=64,
        steps={4: 800, 16: 450, 64: 220},
        held_out_batches=(16,),
        rates=(0.0012, 0.0025, 0.005),
        warmup_steps=10,
        first_step=40,
    ),
    "gpu": Setting(
        layers=4,
        length=128,
        widths=(64, 96, 128, 192),
        held_out=512,
        steps={16: 20_000, 64: 10_000, 256: 5_000},
        held_out_batches=(64, 256),
        rates=(0.001, 0.002, 0.004),
        warmup_steps=100,
        first_step=300,
    ),
}


@dataclasses.dataclass(frozen=True)
class Found:
    """What the runs gave, by seed.

    Attributes:
      small: curves of the small models.
      large: curves of the held-out model, one for each batch size.
      rates: the best of those that were tried, by width and batch size.
    """

    small: Mapping[int, tuple[Curve, ...]]
    large: Mapping[int, tuple[Curve, ...]]
    rates: Mapping[tuple[int, int], float]


def run(budget: Budget) -> Outcome:
    """See the module's docstring."""
    return study(SETTINGS[budget])


def study(setting: Setting) -> Outcome:
    """Trains, fits, predicts and judges."""
    return judge(setting, measure(setting))


def measure(setting: Setting) -> Found:
    """All runs: for each model and batch, the rate is chosen with a seed of its own, then every seed is trained."""
    rows, _ = byte_rows(max(size * steps for size, steps in setting.steps.items()), 1, setting.length)
    jobs = [(width, size) for width in setting.widths for size in setting.steps]
    jobs += [(setting.held_out, size) for size in setting.held_out_batches]
    rates: dict[tuple[int, int], float] = {}
    small: dict[int, list[Curve]] = {seed: [] for seed in setting.seeds}
    large: dict[int, list[Curve]] = {seed: [] for seed in setting.seeds}
    smallest = min(setting.steps)
    with ProgressDisplay(len(jobs)) as progress, ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, (width, size) in enumerate(jobs, 1):
            losses = _losses(setting, width, size, rows)
            tried = [rate * math.sqrt(size / smallest) for rate in setting.rates]
            ends = [_end(curve) for curve in pool.map(losses, tried, [0] * len(tried))]
            best = rates[width, size] = min(zip(ends, tried, strict=True))[1]
            curves = pool.map(losses, [best] * len(setting.seeds), setting.seeds)
            for seed, curve in zip(setting.seeds, curves, strict=True):
                side = large if width == setting.held_out else small
                side[seed].append(_curve(setting, width, size, curve))
            progress.update(done, loss=float(curve[-1]), tokens=len(setting.seeds) * len(curve) * size * setting.length)
    by_seed = [{seed: tuple(curves) for seed, curves in side.items()} for side in (small, large)]
    return Found(by_seed[0], by_seed[1], rates)


def _losses(setting: Setting, width: int, size: int, rows: np.ndarray) -> Callable[[float, int], np.ndarray]:
    curve = make_byte_curve(
        byte_model(setting.layers, width, 2, setting.length),
        OptimizerConfig("adamw", 1.0),
        ScheduleConfig(kind="constant", warmup_steps=setting.warmup_steps),
        Stage(rows[: size * setting.steps[size]], size),
    )
    return lambda rate, seed: curve(rate, seed)["loss"]


def _end(losses: np.ndarray) -> float:
    """The loss over the last eighth, to compare rates by."""
    loss = float(losses[-(len(losses) // 8) :].mean())
    return loss if math.isfinite(loss) else math.inf


def _curve(setting: Setting, width: int, size: int, losses: np.ndarray) -> Curve:
    """Smoothed losses at steps that lie evenly on a logarithmic axis."""
    last = len(losses) * 8 // 9  # later on the window of the mean shrinks
    steps = np.unique(np.geomspace(setting.first_step, last, _POINTS).round().astype(int))
    return Curve(
        parameters=non_embedding_parameters(byte_model(setting.layers, width, 2, setting.length)),
        batch_tokens=size * setting.length,
        steps=tuple(map(float, steps)),
        losses=tuple(smoothed(losses)[steps - 1].tolist()),
    )


def judge(setting: Setting, found: Found) -> Outcome:
    """What the predictions were worth."""
    laws = {seed: fit(found.small[seed], bootstrap=0) for seed in setting.seeds}
    errors = tuple(max(_error(curve, _predicted(laws[seed], curve)) for curve in found.large[seed]) for seed in laws)
    control = tuple(
        max(_error(curve, _widest(found.small[seed], curve)) for curve in found.large[seed]) for seed in laws
    )
    ours = Measured("largest error of a prediction", errors)
    holds = max(errors) < _BOUND
    return Outcome(
        paper="Unraveling the Mystery of Scaling Laws: Part I (Su et al. 2024)",
        url="https://arxiv.org/abs/2403.06563",
        have="Constants from small runs, curves of larger ones (`ml/plan/loss_curve.py`)",
        claim=f"Constants fitted to models of up to 1/{_times(setting):.0f} of its size predict a model's loss at "
        f"every step within {_BOUND:.0f} percent",
        setup=_setup(setting, float(np.mean(control))),
        baseline=Measured("bound", (_BOUND,) * len(setting.seeds)),
        ours=ours,
        unit="percent of the loss",
        relation="<",
        holds=holds,
        seeds=setting.seeds,
        reason="" if holds else f"the largest error is {max(errors):.1f} percent",
        panels=(_panel(setting, found, laws),),
        details={
            "constants": {str(seed): dict(zip(_NAMES, law.constants, strict=True)) for seed, law in laws.items()},
            "rms_residual_percent": {str(seed): 100 * law.rms_residual for seed, law in laws.items()},
            "control_error_percent": list(control),
            "rates": {f"{width}x{size}": rate for (width, size), rate in found.rates.items()},
        },
    )


_NAMES = tuple(field.name for field in dataclasses.fields(LossCurve))[:6]


def _predicted(law: LossCurve, curve: Curve) -> np.ndarray:
    return law.predict(curve.parameters, curve.batch_tokens, curve.steps)


def _widest(small: tuple[Curve, ...], like: Curve) -> np.ndarray:
    """The control: the curve of the widest small model at that batch."""
    same = [curve for curve in small if curve.batch_tokens == like.batch_tokens]
    return np.array(max(same, key=lambda curve: curve.parameters).losses)


def _error(curve: Curve, predicted: np.ndarray) -> float:
    """The largest relative error, in percent."""
    return float(100 * np.max(np.abs(predicted / np.array(curve.losses) - 1)))


def _times(setting: Setting) -> float:
    sizes = [
        non_embedding_parameters(byte_model(setting.layers, width, 2, setting.length))
        for width in (setting.held_out, setting.widths[-1])
    ]
    return sizes[0] / sizes[1]


def _setup(setting: Setting, control: float) -> str:
    widths, sizes = ", ".join(map(str, setting.widths)), ", ".join(map(str, setting.steps))
    held_out = ", ".join(map(str, setting.held_out_batches))
    return (
        f"Transformers of {setting.layers} layer(s) and widths {widths} read the standard library's source once, in "
        f"batches of {sizes} rows of {setting.length} bytes, with AdamW at a constant rate that was chosen for each "
        f"width and batch with another seed. The six constants are fitted to their smoothed losses from step "
        f"{setting.first_step} on; predicted is the curve of width {setting.held_out} at batches of {held_out}, in "
        f"every seed. Holds if the largest error over all steps and seeds is below {_BOUND:.0f} percent. To compare: "
        f"the curve of width {setting.widths[-1]} itself is off by up to {control:.1f} percent (mean over seeds)."
    )


def _panel(setting: Setting, found: Found, laws: Mapping[int, LossCurve]) -> Panel:
    seed = setting.seeds[0]
    series = []
    for curve in found.large[seed]:
        rows = round(curve.batch_tokens / setting.length)
        name = f"width {setting.held_out}, batch {rows}"
        predicted = tuple(_predicted(laws[seed], curve).tolist())
        control = tuple(_widest(found.small[seed], curve).tolist())
        series += [
            Series(f"{name}: predicted", curve.steps, predicted),
            Series(f"{name}: trained", curve.steps, curve.losses, marks_only=True),
            Series(f"width {setting.widths[-1]}, batch {rows}: trained", curve.steps, control, marks_only=True),
        ]
    return Panel("step", "loss (nats per byte)", tuple(series), x_log=True, y_log=True)
