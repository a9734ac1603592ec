"""Learning-rate schedules: warm-up, a decay, scaling with the batch, and re-warm-up for training in stages."""

import dataclasses
import math
from typing import Literal

import optax

from ml.errors import UserError

Kind = Literal["constant", "linear", "polynomial", "cosine", "wsd"]


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage of a staged training (other data, length or batch), with a warm-up of its own.

    Attributes:
      steps: optimizer steps in this stage.
      peak_factor: the stage's peak, as a multiple of the optimizer's (batch-scaled) learning rate.
      warmup_steps: steps of linear warm-up at its start.
      start_factor: rate at its first step, as a fraction of its peak (0: re-warm from zero).
    """

    steps: int
    peak_factor: float = 1.0
    warmup_steps: int = 0
    start_factor: float = 0.0

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} must lie between 0 and the stage's steps={self.steps}")
        if self.peak_factor <= 0 or self.start_factor < 0:
            raise ValueError(f"need peak_factor={self.peak_factor} > 0 and start_factor={self.start_factor} >= 0")


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate moves over training. Steps count from 0; the decay would reach its end at ``total_steps``.

    Attributes:
      kind: shape after warm-up. ``wsd``: warm-up, stable, then decay over the last ``decay_fraction``.
      warmup_steps: steps of linear warm-up (constant over batch sizes in LAMB's recipe).
      warmup_fraction: the same as a fraction of all steps; give one of the two.
      start_factor: rate at step 0, as a fraction of the peak, if there is a warm-up.
      end_factor: rate at the end of the decay, as a fraction of the peak (not for ``constant``).
      power: exponent of the decay (``polynomial`` and ``wsd``); 1 is linear.
      decay_fraction: share of the (stage's) steps that ``wsd`` decays over.
      batch_scaling: multiply the learning rate by ``sqrt(B / base_batch_size)`` or by ``B / base_batch_size``.
      base_batch_size: the batch, in sequences, that the learning rate was found at (with ``batch_scaling``).
      stages: stages with warm-ups of their own; they share ``kind`` and replace the warm-up settings above.
    """

    kind: Kind = "linear"
    warmup_steps: int = 0
    warmup_fraction: float = 0.0
    start_factor: float = 0.0
    end_factor: float = 0.0
    power: float = 1.0
    decay_fraction: float = 0.1
    batch_scaling: Literal["none", "sqrt", "linear"] = "none"
    base_batch_size: int = 0
    stages: tuple[StageConfig, ...] = ()

    def __post_init__(self):
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        is_set = {name for name, default in defaults.items() if getattr(self, name) != default}
        readers = {"end_factor": ("linear", "polynomial", "cosine", "wsd"), "power": ("polynomial", "wsd")}
        readers["decay_fraction"] = ("wsd",)
        for name, kinds in readers.items():
            if name in is_set and self.kind not in kinds:
                raise ValueError(f"{name} is read with kind={' or '.join(map(repr, kinds))}, not with {self.kind!r}")
        if self.warmup_steps and self.warmup_fraction:
            raise ValueError("give warmup_steps or warmup_fraction, not both")
        if self.warmup_steps < 0 or not 0 <= self.warmup_fraction <= 1:
            raise ValueError("need warmup_steps >= 0 and 0 <= warmup_fraction <= 1")
        if self.stages and (doubled := is_set & {"warmup_steps", "warmup_fraction", "start_factor"}):
            raise ValueError(f"with stages, set {', '.join(sorted(doubled))} in each stage instead")
        if not 0 < self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction={self.decay_fraction} must lie in (0, 1]")
        if self.start_factor < 0 or self.end_factor < 0 or self.power <= 0:
            raise ValueError("need start_factor >= 0, end_factor >= 0 and power > 0")
        if (self.batch_scaling != "none") != (self.base_batch_size > 0):
            raise ValueError("batch_scaling and base_batch_size (> 0) go together: give both or neither")


def scaled_learning_rate(config: ScheduleConfig, learning_rate: float, batch_size: int) -> float:
    """The peak rate for ``batch_size`` sequences, given the one found at ``config.base_batch_size``.

    ``sqrt`` is LAMB's rule (You et al. 2020, section 4); ``linear`` is SGD's (Goyal et al. 2017).
    """
    if config.batch_scaling == "none":
        return learning_rate
    ratio = batch_size / config.base_batch_size
    return learning_rate * (math.sqrt(ratio) if config.batch_scaling == "sqrt" else ratio)


def make_schedule(config: ScheduleConfig, learning_rate: float, *, total_steps: int, batch_size: int) -> optax.Schedule:
    """Builds the function step -> learning rate.

    Args:
      config: the shape.
      learning_rate: peak, before batch scaling.
      total_steps: optimizer steps in the whole training.
      batch_size: global batch, in sequences.

    Raises:
      UserError: stages or a warm-up that do not fit ``total_steps``.
    """
    stages = config.stages or (_single_stage(config, total_steps),)
    if (covered := sum(stage.steps for stage in stages)) != total_steps:
        raise UserError(f"schedule.stages add up to {covered} steps, but training has {total_steps}; make them equal")
    peak = scaled_learning_rate(config, learning_rate, batch_size)
    pieces, ends = [], [0]
    for stage in stages:
        pieces.append(_stage_schedule(config, stage, peak * stage.peak_factor))
        ends.append(ends[-1] + stage.steps)
    return pieces[0] if len(pieces) == 1 else optax.join_schedules(pieces, ends[1:-1])


def _single_stage(config: ScheduleConfig, total_steps: int) -> StageConfig:
    warmup_steps = config.warmup_steps or round(config.warmup_fraction * total_steps)
    if warmup_steps > total_steps:
        raise UserError(f"schedule.warmup_steps={warmup_steps} exceeds the {total_steps} steps of training; lower it")
    return StageConfig(steps=total_steps, warmup_steps=warmup_steps, start_factor=config.start_factor)


def _stage_schedule(config: ScheduleConfig, stage: StageConfig, peak: float) -> optax.Schedule:
    after = _decay(config, peak, stage.steps - stage.warmup_steps, stage.steps)
    if not stage.warmup_steps:
        return after
    warmup = optax.linear_schedule(stage.start_factor * peak, peak, stage.warmup_steps)
    return optax.join_schedules([warmup, after], [stage.warmup_steps])


def _decay(config: ScheduleConfig, peak: float, steps: int, stage_steps: int) -> optax.Schedule:
    """The rate after warm-up, over ``steps`` steps; ``stage_steps`` counts the warm-up too."""
    end = config.end_factor * peak
    if config.kind == "constant" or steps == 0:
        return optax.constant_schedule(peak)
    if config.kind == "linear":
        return optax.linear_schedule(peak, end, steps)
    if config.kind == "polynomial":
        return optax.polynomial_schedule(peak, end, config.power, steps)
    if config.kind == "cosine":
        return optax.cosine_decay_schedule(peak, steps, config.end_factor)
    decay_steps = min(steps, max(1, round(config.decay_fraction * stage_steps)))
    return optax.polynomial_schedule(peak, end, config.power, decay_steps, transition_begin=steps - decay_steps)
