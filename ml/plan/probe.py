"""A short training that measures the gradient's noise scale, for advice on the batch size."""

import dataclasses
import math
import os

import numpy as np

from ml.errors import UserError
from ml.optim import ScheduleConfig
from ml.parallel import Rules
from ml.train.config import ExperimentConfig
from ml.train.loop import train
from ml.train.reporting import read_metrics

# Of the second half of the probe; each is left out once, to see how far the estimate depends on it.
_BLOCKS = 8
# A 95% interval of a normal distribution, in standard deviations.
_Z = 1.96


@dataclasses.dataclass(frozen=True)
class NoiseScale:
    """What a probe found.

    Attributes:
      tokens: the noise scale, which estimates the critical batch.
      low, high: 95% interval, from the scatter over steps.
      steps: that were trained.
      batch_tokens: of one step.
      loss: where it was measured. The noise scale grows as the loss falls.
    """

    tokens: float
    low: float
    high: float
    steps: int
    batch_tokens: float
    loss: float


def measure_noise_scale(config: ExperimentConfig, workdir: str | os.PathLike[str], *, steps: int = 100) -> NoiseScale:
    """Trains ``steps`` steps of an experiment and takes the noise scale over the second half.

    The batch, the data and the learning rate are the experiment's; the rate stays at its peak after a warm-up of at
    most half of the probe. A batch of one part is cut into two microbatches.

    Args:
      config: the experiment.
      workdir: a new folder for the probe.
      steps: at least 16.

    Raises:
      UserError: the batch cannot be cut in two, or the noise drowns the gradient.
    """
    if steps < 2 * _BLOCKS:
        raise UserError(f"--probe_steps={steps} is too few to measure anything; use {2 * _BLOCKS} or more")
    train(probe_config(config, steps, Rules.make(config.mesh).batch_shards), workdir)
    rows = [row for row in read_metrics(os.path.join(workdir, "metrics.jsonl")) if row["step"] > steps // 2]
    return summarized(rows, steps)


def probe_config(config: ExperimentConfig, steps: int, shards: int) -> ExperimentConfig:
    """The experiment as `measure_noise_scale` trains it, on a mesh with ``shards`` shards of the batch.

    Raises:
      UserError: its batch cannot be cut in two.
    """
    train_config, old = config.train, config.schedule
    microbatches = train_config.microbatches if train_config.microbatches > 1 else 2
    if train_config.batch_size % (microbatches * shards):
        raise UserError(
            f"--measure compares parts of a batch, but config.train.batch_size={train_config.batch_size} is not a "
            f"multiple of {microbatches} microbatches x {shards} batch shards; use a multiple of "
            f"{microbatches * shards}"
        )
    warmup = old.warmup_steps or round(old.warmup_fraction * train_config.steps)
    schedule = ScheduleConfig(
        kind="constant",
        warmup_steps=min(warmup, steps // 2),
        start_factor=old.start_factor,
        batch_scaling=old.batch_scaling,
        base_batch_size=old.base_batch_size,
    )
    return dataclasses.replace(
        config,
        schedule=schedule,
        train=dataclasses.replace(
            train_config, steps=steps, microbatches=microbatches, noise_scale=True, ema=0.0, log_every=1
        ),
        data=dataclasses.replace(config.data, heldout_fraction=0.0),  # nothing is evaluated
        eval=dataclasses.replace(config.eval, every=0),
        checkpoint=dataclasses.replace(config.checkpoint, every=steps),
    )


def summarized(rows: list[dict], steps: int) -> NoiseScale:
    """The noise scale over rows of ``metrics.jsonl``: the ratio of means, its interval by the jackknife over blocks.

    Raises:
      UserError: the noise drowns the gradient.
    """
    parts = np.array([[row["noise_variance"], row["noise_signal"], row["loss"], row["tokens"]] for row in rows])
    parts = parts[np.isfinite(parts).all(1)]
    if len(parts) < _BLOCKS or parts[:, 1].mean() <= 0:
        raise UserError(
            f"--measure: the noise drowns the gradient in {len(parts)} steps; raise --probe_steps, or the batch of the "
            "probe with --config.train.batch_size"
        )
    means = np.array([block.mean(0) for block in np.array_split(parts, _BLOCKS)])
    whole = parts.mean(0)
    without = (means.sum(0) - means) / (_BLOCKS - 1)
    if without[:, 1].min() <= 0:
        error = math.inf
    else:
        ratios = np.log(without[:, 0] / without[:, 1])
        error = _Z * math.sqrt((_BLOCKS - 1) * float(ratios.var()))
    scale = float(whole[0] / whole[1])
    return NoiseScale(
        tokens=scale,
        low=scale * math.exp(-error),
        high=scale * math.exp(error),
        steps=steps,
        batch_tokens=float(whole[3]),
        loss=float(whole[2]),
    )
