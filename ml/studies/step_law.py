"""Step Law: the best batch size grows with the number of training tokens, whatever the width of the model.

Li et al. 2025, "Predictable Scale, Part I". Small transformers of two widths read more and more bytes once, with a
cosine decay, at a grid of batch sizes, each at its own best learning rate. The law's exponent of data is fitted for
every seed; its constants are not expected here.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ml.optim import OptimizerConfig, ScheduleConfig
from ml.plan.step_law import STEP_LAW
from ml.studies.batch_sweep import tune
from ml.studies.byte_text import byte_rows
from ml.studies.byte_training import Stage, byte_model, make_byte_training
from ml.studies.outcome import Budget, Measured, Outcome, Panel, Series
from ml.train.reporting.progress import ProgressDisplay


@dataclasses.dataclass(frozen=True)
class Setting:
    """How large the study is.

    Attributes:
      widths: of the models.
      layers, length: of all of them.
      rows: how many are read, ascending.
      batches: sizes in rows to try with each of ``rows``, ascending.
      rate: where the search for the best learning rate begins, at ``batches[0]``; it grows with the square root.
      heldout_rows: to test on.
      seeds: of parameters and order.
    """

    widths: tuple[int, ...]
    layers: int
    length: int
    rows: tuple[int, ...]
    batches: Mapping[int, tuple[int, ...]]
    rate: float
    heldout_rows: int
    seeds: tuple[int, ...] = (1, 2, 3)


SETTINGS: Mapping[Budget, Setting] = {
    "cpu": Setting(
        widths=(16, 48),
        layers=1,
        length=32,
        rows=(256, 1024, 4096),
        batches={256: (1, 2, 4, 8), 1024: (1, 2, 4, 8, 16), 4096: (2, 4, 8, 16, 32)},
        rate=0.004,
        heldout_rows=512,
    ),
    "gpu": Setting(
        widths=(128, 384),
        layers=4,
        length=128,
        rows=(4096, 16_384, 65_536),
        batches={4096: (4, 8, 16, 32, 64), 16_384: (8, 16, 32, 64, 128), 65_536: (8, 16, 32, 64, 128, 256)},
        rate=0.002,
        heldout_rows=2048,
    ),
}

Losses = Mapping[tuple[int, int], Mapping[int, tuple[float, ...]]]
"""``(width, rows) -> batch -> held-out losses``, one for each seed."""


def run(budget: Budget) -> Outcome:
    """See the module's docstring."""
    return study(SETTINGS[budget])


def study(setting: Setting) -> Outcome:
    """Trains and judges."""
    return judge(setting, measure(setting))


def measure(setting: Setting) -> Losses:
    """All runs. Rates are tuned in each cell at each batch with another seed; the search may leave its beginnings."""
    rows, heldout = byte_rows(max(setting.rows), setting.heldout_rows, setting.length)
    cells = [
        (width, count, batch) for width in setting.widths for count in setting.rows for batch in setting.batches[count]
    ]
    losses: dict[tuple[int, int], dict[int, tuple[float, ...]]] = {}
    with ProgressDisplay(len(cells)) as progress, ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, (width, count, batch) in enumerate(cells, 1):
            training = functools.cache(_training(setting, width, batch, rows[:count], heldout))
            first = setting.rate * math.sqrt(batch / setting.batches[count][0])
            candidates = [first / 2, first, 2 * first]
            list(pool.map(training, candidates, [0] * len(candidates)))  # at the same time
            tried = tune(training, candidates, (0,))
            best = min(tried, key=tried.__getitem__)
            found = tuple(pool.map(training, [best] * len(setting.seeds), setting.seeds))
            losses.setdefault((width, count), {})[batch] = found
            progress.update(done, loss=found[0], tokens=count * setting.length)
    return losses


def _training(
    setting: Setting, width: int, batch: int, rows: np.ndarray, heldout: np.ndarray
) -> Callable[[float, int], float]:
    schedule = ScheduleConfig(kind="cosine", warmup_fraction=0.1, end_factor=0.02)
    model = byte_model(setting.layers, width, 2, setting.length)
    training = make_byte_training(model, OptimizerConfig("adamw", 1.0), schedule, [Stage(rows, batch)], heldout)

    def finite(rate: float, seed: int) -> float:
        loss = training(rate, seed)
        return loss if math.isfinite(loss) else 10.0

    return finite


def best_batch(losses: Mapping[int, float]) -> float:
    """The lowest point of a parabola through the least loss and its neighbours, over the logarithm of the batch."""
    sizes = sorted(losses)
    middle = min(range(len(sizes)), key=lambda i: losses[sizes[i]])
    near = sizes[max(0, middle - 1) : middle + 2]
    if len(near) < 3:  # the least is the outermost
        return float(sizes[middle])
    bend, slope, _ = np.polyfit(np.log(near), [losses[size] for size in near], 2)
    return math.exp(-slope / (2 * bend)) if bend > 0 else float(sizes[middle])


def judge(setting: Setting, losses: Losses) -> Outcome:
    """What the losses say of the claim."""
    best = {
        cell: tuple(best_batch({size: values[i] for size, values in table.items()}) for i in range(len(setting.seeds)))
        for cell, table in losses.items()
    }
    tokens = np.log([count * setting.length for count in setting.rows])
    exponents = {
        width: tuple(
            float(np.polyfit(tokens, np.log([best[width, count][i] for count in setting.rows]), 1)[0])
            for i in range(len(setting.seeds))
        )
        for width in setting.widths
    }
    least = min(exponents, key=lambda width: float(np.mean(exponents[width])))
    holds = all(exponent > 0 for values in exponents.values() for exponent in values)
    published = STEP_LAW.batch_tokens.exponents[0]
    return Outcome(
        paper="Predictable Scale, Part I: Optimal Hyperparameter Scaling Law (Li et al. 2025)",
        url="https://arxiv.org/abs/2503.04715",
        have="The law with its range and intervals, and its fit (`ml/plan/step_law.py`), `scripts/advise.py`",
        claim="The best batch size grows with the number of training tokens, whatever the width of the model",
        setup=_setup(setting),
        baseline=Measured("no growth", (0.0,) * len(setting.seeds)),
        ours=Measured(f"exponent at width {least}", exponents[least]),
        unit="exponent of data in the best batch",
        relation=">",
        holds=holds,
        seeds=setting.seeds,
        reason="" if holds else "; ".join(f"width {w}: {_listed(values)}" for w, values in exponents.items()),
        panels=(
            *(_loss_panel(setting, losses, width) for width in setting.widths),
            _best_panel(setting, best, published),
        ),
        details={
            "exponents": {str(width): list(values) for width, values in exponents.items()},
            "published_exponent": published,
            "best_batch_rows": {f"{width}x{count}": list(values) for (width, count), values in best.items()},
            "heldout_loss": {
                f"{width}x{count}": {str(size): list(values) for size, values in table.items()}
                for (width, count), table in losses.items()
            },
        },
    )


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


def _setup(setting: Setting) -> str:
    tokens = ", ".join(f"{count * setting.length:,}" for count in setting.rows)
    widths = ", ".join(map(str, setting.widths))
    return (
        f"Transformers of {setting.layers} layer(s) and widths {widths} read {tokens} bytes of the standard library's "
        f"source once, in rows of {setting.length}, with AdamW and a cosine to 2% of the peak; batches in steps of "
        "two, the rate tuned for each of them with another seed in steps of two. The best batch is where a parabola "
        "through the least held-out loss and its neighbours is lowest. Holds if it grows in every seed at every width; "
        "shown is the exponent of the width where it grows least."
    )


def _loss_panel(setting: Setting, losses: Losses, width: int) -> Panel:
    series = []
    for count in setting.rows:
        table = {size: np.array(values) for size, values in sorted(losses[width, count].items())}
        x = tuple(float(size * setting.length) for size in table)
        y = tuple(float(values.mean()) for values in table.values())
        spread = tuple(float(values.std(ddof=1)) for values in table.values())
        series.append(Series(f"{count * setting.length:,} bytes", x, y, spread))
    label = "held-out loss (nats per byte)"
    return Panel("batch size (tokens)", label, tuple(series), title=f"width {width}", x_log=True)


def _best_panel(setting: Setting, best: Mapping[tuple[int, int], tuple[float, ...]], published: float) -> Panel:
    x = tuple(float(count * setting.length) for count in setting.rows)
    series = []
    for width in setting.widths:
        values = [np.array(best[width, count]) * setting.length for count in setting.rows]
        y, spread = tuple(float(v.mean()) for v in values), tuple(float(v.std(ddof=1)) for v in values)
        series.append(Series(f"width {width}", x, y, spread))
    middle = float(np.mean([one.y[len(x) // 2] for one in series]))
    law = tuple(middle * (tokens / x[len(x) // 2]) ** published for tokens in x)
    series.append(Series(f"slope of the published law, {published:.3f}", x, law))
    return Panel("training tokens", "best batch size (tokens)", tuple(series), x_log=True, y_log=True)
