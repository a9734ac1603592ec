"""LAMB: as the batch grows 16x at fixed epochs, its loss degrades less than that of AdamW and LARS.

A small transformer learns the bytes of Python source. Each optimizer's learning rate is tuned at the smallest batch
only; larger batches get the paper's two rules (You et al. 2020, section 4 and tables of hyperparameters): the rate
grows with the square root of the batch, and the number of warm-up steps is kept, so that its share of the training
grows with the batch.
"""

import dataclasses
import math
from collections.abc import Mapping

from ml.models import TransformerConfig
from ml.optim import OptimizerConfig, ScheduleConfig
from ml.studies.batch_sweep import Plan, Sweep, Training, clearly_less, sweep
from ml.studies.byte_text import VOCAB_SIZE, byte_rows
from ml.studies.byte_training import Stage, byte_model, make_byte_training
from ml.studies.outcome import Budget, Measured, Outcome, Panel

OPTIMIZERS = {"lamb": "LAMB", "adamw": "AdamW", "lars": "LARS"}
_UNIFORM = math.log(VOCAB_SIZE)  # what a guess costs; a run that diverged knows no more


@dataclasses.dataclass(frozen=True)
class Setting:
    """How large the study is.

    Attributes:
      model: the transformer.
      rows: to train on, once.
      heldout_rows: to test on.
      warmup_steps: at every batch size.
      plan: optimizers, batch sizes in rows, seeds.
      weight_decay: of all optimizers.
    """

    model: TransformerConfig
    rows: int
    heldout_rows: int
    warmup_steps: int
    plan: Plan
    weight_decay: float = 0.01


SETTINGS: Mapping[Budget, Setting] = {
    "cpu": Setting(
        model=byte_model(num_layers=1, embed_dim=48, num_heads=4, length=32),
        rows=4096,
        heldout_rows=1024,
        warmup_steps=12,
        plan=Plan((4, 16, 64), {"lamb": 0.02, "adamw": 0.003, "lars": 0.02}, _UNIFORM),
    ),
    "gpu": Setting(
        model=byte_model(num_layers=6, embed_dim=384, num_heads=6, length=128),
        rows=49152,
        heldout_rows=4096,
        warmup_steps=20,
        plan=Plan((16, 64, 256, 512), {"lamb": 0.01, "adamw": 0.001, "lars": 0.01}, _UNIFORM),
    ),
}


def run(budget: Budget) -> Outcome:
    """See the module's docstring."""
    return study(SETTINGS[budget])


def study(setting: Setting) -> Outcome:
    """Tunes, trains and judges."""
    rows, heldout = byte_rows(setting.rows, setting.heldout_rows, setting.model.max_length)

    def make_training(name: str, batch_size: int) -> Training:
        optimizer = OptimizerConfig(name, learning_rate=1.0, weight_decay=setting.weight_decay)
        schedule = ScheduleConfig(
            kind="linear",
            warmup_steps=setting.warmup_steps,
            batch_scaling="sqrt",
            base_batch_size=setting.plan.batch_sizes[0],
        )
        return make_byte_training(setting.model, optimizer, schedule, [Stage(rows, batch_size)], heldout)

    return judge(setting, sweep(setting.plan, make_training, setting.rows * setting.model.max_length))


def judge(setting: Setting, swept: Sweep) -> Outcome:
    """What the losses say of the claim."""
    first, last = setting.plan.batch_sizes[0], setting.plan.batch_sizes[-1]
    rivals = [name for name in OPTIMIZERS if name != "lamb"]
    nearest = min(rivals, key=lambda name: swept.lost(name).mean())
    unbeaten = [name for name in rivals if not clearly_less(swept.lost("lamb"), swept.lost(name))]
    return Outcome(
        paper="Large Batch Optimization for Deep Learning: Training BERT in 76 minutes (You et al. 2020)",
        url="https://arxiv.org/abs/1904.00962",
        have="LAMB and LARS (`ml/optim/lamb.py`, `lars.py`), the scaling rules (`ml/optim/schedules.py`)",
        claim=f"As the batch grows {last // first}x at a fixed number of epochs, with the rate scaled by the square "
        "root and warm-up steps kept, LAMB's loss degrades less than AdamW's and LARS's",
        setup=_setup(setting),
        baseline=_measured(nearest, swept),
        ours=_measured("lamb", swept),
        unit=f"nats per byte lost from batch {first} to {last}",
        relation="<",
        holds=not unbeaten,
        seeds=setting.plan.seeds,
        reason="; ".join(_objection(name, swept) for name in unbeaten),
        panels=_panels(swept),
        details=swept.details(),
    )


def _measured(name: str, swept: Sweep) -> Measured:
    return Measured(OPTIMIZERS[name], tuple(map(float, swept.lost(name))))


def _setup(setting: Setting) -> str:
    model, sizes = setting.model, setting.plan.batch_sizes
    steps = ", ".join(f"{setting.rows // size:,}" for size in sizes)
    return (
        f"A transformer of {model.num_layers} x {model.embed_dim} reads {setting.rows:,} rows of {model.max_length} "
        f"bytes of the standard library's source once, in batches of {', '.join(map(str, sizes))} rows ({steps} steps, "
        f"{setting.warmup_steps} of them warm-up, then linear decay to 0). Rates are tuned at batch {sizes[0]} with "
        f"{len(setting.plan.tuning_seeds)} other seeds, in steps of two. Counted is the loss on "
        f"{setting.heldout_rows:,} rows of other files. Holds if LAMB loses less than each of the others by more than "
        "two standard errors of the difference, paired by seed; shown is the one that comes nearest."
    )


def _objection(name: str, swept: Sweep) -> str:
    """In numbers, what keeps the claim from holding against one of the others."""
    lost, ours = swept.lost(name).mean(), swept.lost("lamb").mean()
    first, last = swept.plan.batch_sizes[0], swept.plan.batch_sizes[-1]
    how = "loses less than LAMB" if lost < ours else "cannot be told from LAMB"
    return (
        f"{OPTIMIZERS[name]} {how} ({lost:.2f} against {ours:.2f}): it goes from {swept.mean(name, first):.2f} to "
        f"{swept.mean(name, last):.2f}, LAMB from {swept.mean('lamb', first):.2f} to {swept.mean('lamb', last):.2f}"
    )


def _panels(swept: Sweep) -> tuple[Panel, ...]:
    label = "batch size (rows)"
    losses = tuple(swept.series(name, title) for name, title in OPTIMIZERS.items())
    lost = tuple(swept.series(name, title, lost=True) for name, title in OPTIMIZERS.items())
    since = f"lost since batch {swept.plan.batch_sizes[0]} (nats per byte)"
    return Panel(label, "held-out loss (nats per byte)", losses, x_log=True), Panel(label, since, lost, x_log=True)
