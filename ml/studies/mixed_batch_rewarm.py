"""LAMB: a second stage on longer rows wants its learning rate warmed up again from zero.

The mixed-batch recipe (You et al. 2020, section 4.1) in small: nine tenths of the rows are short and come in large
batches, the last tenth is four times as long and comes in batches half as large. Both stages end with a rate of zero;
what differs is whether the second one starts from its peak or is warmed up again. Each variant has its own best rate.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ml.models import TransformerConfig
from ml.optim import OptimizerConfig, ScheduleConfig, StageConfig
from ml.studies.batch_sweep import clearly_less
from ml.studies.byte_text import VOCAB_SIZE, byte_rows
from ml.studies.byte_training import Stage, byte_model, make_byte_training
from ml.studies.outcome import Budget, Measured, Outcome, Panel, Series
from ml.train.reporting.progress import ProgressDisplay

NAMES = {True: "re-warmed", False: "not re-warmed"}
_LONGER = 4  # 128 and 512 tokens in the paper
_UNIFORM = math.log(VOCAB_SIZE)  # what a guess costs; a run that diverged knows no more


@dataclasses.dataclass(frozen=True)
class Setting:
    """How large the study is.

    Attributes:
      model: the transformer; its ``max_length`` is that of the long rows.
      rows: of both stages together.
      heldout_rows: long ones.
      batch_size: of the first stage, in rows.
      rates: peaks to try, ascending.
      seeds: of parameters and order.
    """

    model: TransformerConfig
    rows: int
    heldout_rows: int
    batch_size: int
    rates: tuple[float, ...]
    seeds: tuple[int, ...] = (1, 2, 3)


_RATES = (0.01, 0.02, 0.04, 0.08, 0.16)
SETTINGS: Mapping[Budget, Setting] = {
    "cpu": Setting(byte_model(1, 48, 4, 128), rows=4480, heldout_rows=256, batch_size=32, rates=_RATES),
    "gpu": Setting(byte_model(6, 384, 6, 256), rows=65536, heldout_rows=2048, batch_size=256, rates=_RATES),
}


def run(budget: Budget) -> Outcome:
    """See the module's docstring."""
    return study(SETTINGS[budget])


def study(setting: Setting) -> Outcome:
    """Trains both variants at every rate with every seed, and judges."""
    stages, heldout = stages_of(setting)
    tokens = sum(stage.rows[:, 1:].size for stage in stages)
    losses: dict[bool, dict[float, tuple[float, ...]]] = {True: {}, False: {}}
    done = 0
    with ProgressDisplay(len(NAMES) * len(setting.rates) * len(setting.seeds)) as progress:
        for again in NAMES:
            optimizer = OptimizerConfig("lamb", learning_rate=1.0, weight_decay=0.01)
            training = make_byte_training(setting.model, optimizer, schedule(stages, again), stages, heldout)
            for rate in setting.rates:
                results = []
                for seed in setting.seeds:
                    loss = training(rate, seed)
                    results.append(min(loss, _UNIFORM) if math.isfinite(loss) else _UNIFORM)
                    done += 1
                    progress.update(done, loss=results[-1], tokens=tokens)
                losses[again][rate] = tuple(results)
    return judge(setting, losses)


def schedule(stages: list[Stage], again: bool) -> ScheduleConfig:
    """Both stages decay to zero; a fifth of the first is warm-up, and of the second if it is warmed up ``again``."""
    first, second = (stage.steps for stage in stages)
    warm = (StageConfig(first, warmup_steps=first // 5), StageConfig(second, warmup_steps=second // 5 if again else 0))
    return ScheduleConfig(kind="linear", stages=warm)


def stages_of(setting: Setting) -> tuple[list[Stage], np.ndarray]:
    """The short rows and the long ones, of different parts of the text, and rows to test on."""
    length = setting.model.max_length
    long = setting.rows // 10
    short = setting.rows - long
    pieces = -(-short // _LONGER)
    rows, heldout = byte_rows(pieces + long, setting.heldout_rows, length)
    # A short row is a part of a long one with one byte more, the target of its last.
    part = length // _LONGER
    starts = np.arange(0, length, part)
    cut = np.concatenate([rows[:pieces, start : start + part + 1] for start in starts])[:short]
    return [Stage(cut, setting.batch_size), Stage(rows[pieces:], setting.batch_size // 2)], heldout


def judge(setting: Setting, losses: Mapping[bool, Mapping[float, tuple[float, ...]]]) -> Outcome:
    """What the losses (by variant and rate, one for each seed) say of the claim."""
    best = {again: min(setting.rates, key=lambda rate: np.mean(losses[again][rate])) for again in NAMES}
    ours, theirs = (np.array(losses[again][best[again]]) for again in (True, False))
    holds = clearly_less(ours, theirs)
    return Outcome(
        paper="Large Batch Optimization for Deep Learning: Training BERT in 76 minutes (You et al. 2020)",
        url="https://arxiv.org/abs/1904.00962",
        have="training in stages with a warm-up of their own (`ml/optim/schedules.py`)",
        claim="In the mixed-batch recipe, warming the rate up again for the stage of long rows lowers the final loss",
        setup=_setup(setting, best),
        baseline=Measured(NAMES[False], tuple(map(float, theirs))),
        ours=Measured(NAMES[True], tuple(map(float, ours))),
        unit="nats per byte",
        relation="<",
        holds=holds,
        seeds=setting.seeds,
        reason="" if holds else _reason(ours, theirs),
        panels=(_panel(setting, losses),),
        details={"heldout_loss": {NAMES[a]: {f"{r:g}": list(v) for r, v in losses[a].items()} for a in NAMES}},
    )


def _reason(ours: np.ndarray, theirs: np.ndarray) -> str:
    gain = float((theirs - ours).mean())
    if gain <= 0:
        return f"starting the second stage from its peak does no harm here: without a second warm-up {-gain:.3f} lower"
    return f"the gain of {gain:.3f} is within the noise of {len(ours)} seeds"


def _setup(setting: Setting, best: Mapping[bool, float]) -> str:
    length, size = setting.model.max_length, setting.batch_size
    long = setting.rows // 10
    steps = (setting.rows - long) // size, long // (size // 2)
    edge = [NAMES[again] for again in NAMES if best[again] in (setting.rates[0], setting.rates[-1])]
    note = f" The best rate lies at the edge of those tried for: {', '.join(edge)}." if edge else ""
    return (
        f"A transformer of {setting.model.num_layers} x {setting.model.embed_dim} reads bytes of the standard "
        f"library's source with LAMB: {setting.rows - long:,} rows of {length // _LONGER} in batches of {size} "
        f"({steps[0]} steps), then {long:,} rows of {length} in batches of {size // 2} ({steps[1]} steps). Each stage "
        f"decays to 0; warm-up is a fifth of a stage. Either variant at its best of {len(setting.rates)} peak rates "
        f"({best[True]:g} and {best[False]:g}); counted is the loss on {setting.heldout_rows:,} long rows of other "
        f"files. Holds if the difference, paired by seed, is more than two standard errors.{note}"
    )


def _panel(setting: Setting, losses: Mapping[bool, Mapping[float, tuple[float, ...]]]) -> Panel:
    def series(again: bool) -> Series:
        values: list[Any] = [np.array(losses[again][rate]) for rate in setting.rates]
        means, spread = tuple(float(v.mean()) for v in values), tuple(float(v.std(ddof=1)) for v in values)
        return Series(NAMES[again], setting.rates, means, spread)

    return Panel("peak learning rate", "held-out loss (nats per byte)", (series(True), series(False)), x_log=True)
