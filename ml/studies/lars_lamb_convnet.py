"""LARS and LAMB do about equally well on a convolutional network, also where the batch is large.

A small residual network learns handwritten digits. As in `ml.studies.lamb_batch_size`, each optimizer's rate is tuned
at the smallest batch only; larger ones get the paper's two rules (You et al. 2020, section 4): the rate grows with the
square root of the batch, and the number of warm-up steps is kept.
"""

import dataclasses
import math
from collections.abc import Mapping

from ml.models import ResNetConfig
from ml.optim import OptimizerConfig, ScheduleConfig
from ml.studies.batch_sweep import Plan, Sweep, Training, sweep
from ml.studies.digits_training import CLASSES, Reading, digits, digits_model, make_digits_training
from ml.studies.outcome import Budget, Measured, Outcome, Panel, related

OPTIMIZERS = {"lamb": "LAMB", "lars": "LARS", "sgd": "SGD with momentum"}
# How far apart two losses may lie and still be about equal, as a share of the lower one.
TOLERANCE = 0.25
_GUESS = math.log(CLASSES)  # a run that diverged knows no more


@dataclasses.dataclass(frozen=True)
class Setting:
    """How large the study is.

    Attributes:
      model: the network.
      epochs: passes over the training images.
      warmup_steps: at every batch size.
      plan: optimizers, batch sizes in images, seeds.
      weight_decay: of all optimizers.
    """

    model: ResNetConfig
    epochs: int
    warmup_steps: int
    plan: Plan
    weight_decay: float = 0.01


SETTINGS: Mapping[Budget, Setting] = {
    "cpu": Setting(
        model=digits_model(8, (1, 1)),
        epochs=24,  # fewer steps of 512 teach no optimizer anything
        warmup_steps=5,
        plan=Plan(
            (32, 128, 512),
            {"lamb": 0.02, "lars": 0.08, "sgd": 0.2},
            _GUESS,
            seeds=(1, 2, 3),
            tuning_seeds=(11, 12),
        ),
    ),
    "gpu": Setting(
        model=digits_model(32, (2, 2, 2)),
        epochs=40,
        warmup_steps=20,
        plan=Plan((32, 128, 512), {"lamb": 0.02, "lars": 0.02, "sgd": 0.05}, _GUESS),
    ),
}


def run(budget: Budget) -> Outcome:
    """See the module's docstring."""
    return study(SETTINGS[budget])


def study(setting: Setting) -> Outcome:
    """Tunes, trains and judges."""

    def make_training(name: str, batch_size: int) -> Training:
        optimizer = OptimizerConfig(name, learning_rate=1.0, weight_decay=setting.weight_decay)
        schedule = ScheduleConfig(
            kind="linear",
            warmup_steps=setting.warmup_steps,
            batch_scaling="sqrt",
            base_batch_size=setting.plan.batch_sizes[0],
        )
        training = make_digits_training(setting.model, optimizer, schedule, Reading(batch_size, setting.epochs))
        return lambda rate, seed: training(rate, seed)["loss"]

    images = len(digits()[0]["images"]) * setting.epochs
    return judge(setting, sweep(setting.plan, make_training, images))


def judge(setting: Setting, swept: Sweep) -> Outcome:
    """What the losses say of the claim."""
    first, last = setting.plan.batch_sizes[0], setting.plan.batch_sizes[-1]
    lamb, lars = (Measured(OPTIMIZERS[name], swept.losses[name][last]) for name in ("lamb", "lars"))
    holds = related(lamb.mean, "~", lars.mean, TOLERANCE)
    lower, higher = sorted((lamb, lars), key=lambda side: side.mean)
    return Outcome(
        paper="Large Batch Optimization for Deep Learning: Training BERT in 76 minutes (You et al. 2020)",
        url="https://arxiv.org/abs/1904.00962",
        have="LAMB and LARS (`ml/optim/lamb.py`, `lars.py`), residual networks (`ml/models/resnet.py`), the ImageNet "
        "recipes (`configs/resnet`)",
        claim=f"On a convolutional network LARS and LAMB end within {TOLERANCE:.0%} of each other's loss as the batch "
        f"grows {last // first}x at a fixed number of epochs",
        setup=_setup(setting),
        baseline=lars,
        ours=lamb,
        unit=f"nats per held-out image at batch {last}",
        relation="~",
        tolerance=TOLERANCE,
        holds=holds,
        seeds=setting.plan.seeds,
        reason=""
        if holds
        else f"{lower.name} ends at {lower.mean:.3f}, {higher.name} at {higher.mean:.3f}, "
        f"{higher.mean / lower.mean - 1:.0%} above it",
        panels=(_panel(swept),),
        details=swept.details(),
    )


def _setup(setting: Setting) -> str:
    sizes = setting.plan.batch_sizes
    train, heldout = digits()
    images = len(train["images"])
    steps = ", ".join(str(images * setting.epochs // size) for size in sizes)
    return (
        f"A residual network of {sum(setting.model.blocks)} blocks from {setting.model.width} channels on reads "
        f"{images:,} of scikit-learn's digits {setting.epochs} times, in batches of {', '.join(map(str, sizes))} "
        f"({steps} steps, {setting.warmup_steps} of them warm-up, then linear decay to 0). Rates are tuned at batch "
        f"{sizes[0]} with {len(setting.plan.tuning_seeds)} other seeds, in steps of two. Counted is the loss on "
        f"{int(heldout['loss_mask'].sum())} other digits. SGD with momentum is drawn for comparison and not judged."
    )


def _panel(swept: Sweep) -> Panel:
    losses = tuple(swept.series(name, title) for name, title in OPTIMIZERS.items())
    return Panel("batch size (images)", "held-out loss (nats per image)", losses, x_log=True, y_log=True)
