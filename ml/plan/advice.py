"""Which batch, learning rate, warm-up and split to train an experiment with: each number with where it comes from."""

import dataclasses
import math
from typing import Any

from ml.errors import UserError
from ml.optim import scaled_learning_rate
from ml.plan.mends import changed
from ml.plan.planner import MARGIN, Plan, search
from ml.plan.probe import NoiseScale
from ml.plan.step_law import FINAL_LEARNING_RATE, STEP_LAW, Estimate, non_embedding_parameters
from ml.plan.topology import Topology
from ml.train.config import ExperimentConfig
from ml.train.kinds import check_reads_text

# Fewer steps than this cannot warm up, train and decay.
_FEWEST_STEPS = 50
# Step Law's runs warmed up for so many steps, and LAMB's recipe for at most so large a share of them.
_WARMUP_STEPS, _WARMUP_SHARE, _LAMB_WARMUP_SHARE = 2000, 0.1, 0.2
_RATE_FREE = ("dadapt_adamw", "prodigy", "dog", "dowg", "mechanic_adamw", "cocob")


@dataclasses.dataclass(frozen=True)
class Number:
    """A recommendation.

    Attributes:
      name: what it is.
      value: how much of ``unit``.
      unit: may be empty.
      source: where it comes from, in a sentence.
      interval: 95% bounds of what the source says, where it says so.
    """

    name: str
    value: float
    unit: str
    source: str
    interval: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Advice:
    """All that is recommended.

    Attributes:
      tokens: of the whole training, as asked.
      parameters: outside of the tables.
      numbers: in the order of their derivation.
      notes: what to know before trusting them.
      overrides: keys of the experiment that follow them.
    """

    tokens: int
    parameters: int
    numbers: tuple[Number, ...]
    notes: tuple[str, ...]
    overrides: dict[str, Any]

    @property
    def flags(self) -> str:
        """To paste after a command."""
        return " ".join(f"--config.{key}={_plain(value)}" for key, value in self.overrides.items())

    def number(self, name: str) -> Number:
        """The recommendation of this name."""
        return next(one for one in self.numbers if one.name == name)


def advise(
    config: ExperimentConfig,
    tokens: int,
    *,
    topology: Topology | None = None,
    noise: NoiseScale | None = None,
    global_batch: int | None = None,
    batch_shards: int = 1,
) -> Advice:
    """Recommends how to train ``config`` on ``tokens`` tokens.

    Args:
      config: the experiment.
      tokens: of the whole training.
      topology: the machine; ``None``: this one, whose split is the experiment's.
      noise: what a probe of the same experiment has measured.
      global_batch: in sequences, where it is settled; the rest is then advised for it.
      batch_shards: into how many parts this machine's mesh cuts a batch; not read with a ``topology``.

    Raises:
      UserError: too few tokens, a staged schedule, a batch that cannot be cut on that machine, a model of images.
    """
    check_reads_text(config, "the advisor")
    if config.schedule.stages:
        raise UserError(
            "config.schedule.stages: the advice is for a single stage; leave them out, and ask for each stage"
        )
    length = config.data.sequence_length
    if tokens < _FEWEST_STEPS * length:
        raise UserError(
            f"--tokens={tokens:,} is too few: even at one sequence of {length} tokens a step it is less than "
            f"{_FEWEST_STEPS} steps; give at least {_FEWEST_STEPS * length:,}"
        )
    parameters = non_embedding_parameters(config.model)
    law = STEP_LAW.batch_tokens.at(tokens)
    target, source, interval, notes = _target_batch(config, tokens, law, noise, global_batch)
    chosen: dict[str, Any]
    if topology is not None:
        batch, plan, count = _planned(config, topology, target / length, global_batch)
        split, chosen = _planned_split(plan, topology, count), plan.overrides
    else:
        batch, microbatches = _split_here(config, target / length, global_batch, batch_shards)
        rows = batch // microbatches
        text = f"microbatches of {rows} sequences as in the config; --topology plans the split by memory"
        split, chosen = [Number("microbatches", microbatches, "", text)], {"train.microbatches": microbatches}
    steps = tokens // (batch * length)
    if steps < _FEWEST_STEPS:
        raise UserError(
            f"--tokens={tokens:,} is too few for batches of {batch} sequences of {length} tokens: {steps} steps; "
            f"give at least {_FEWEST_STEPS * batch * length:,}, or a smaller --global_batch"
        )
    numbers = [
        Number("global batch", batch, "sequences", source, interval and (interval[0] / length, interval[1] / length)),
        Number("batch in tokens", batch * length, "tokens", f"{batch} sequences of {length}"),
        Number("steps", steps, "", f"{tokens:,} tokens in such batches, whole ones"),
    ]
    if noise is not None:
        numbers += _by_noise(noise, batch * length)
    rate, rate_overrides, more = _learning_rate(config, parameters, tokens, batch, scale=target != law.value)
    warmup = _warmup(config, steps)
    notes += more
    overrides = {
        "train.steps": steps,
        "train.batch_size": batch,
        **chosen,
        **rate_overrides,
        "schedule.warmup_steps": int(warmup.value),
        "schedule.warmup_fraction": 0.0,
    }
    return Advice(tokens, parameters, (*numbers, rate, warmup, *split), tuple(notes), overrides)


def _target_batch(
    config: ExperimentConfig, tokens: int, law: Estimate, noise: NoiseScale | None, global_batch: int | None
) -> tuple[float, str, tuple[float, float] | None, list[str]]:
    """Tokens, where they come from, bounds, notes. The law where it holds, else what was measured, else the law."""
    notes: list[str] = []
    by_law = f"Step Law, 0.58 D^0.571 = {_short(law.value)} tokens"
    if global_batch is not None:
        if law.outside:
            return global_batch * config.data.sequence_length, "--global_batch", None, notes
        return global_batch * config.data.sequence_length, f"--global_batch ({by_law})", None, notes
    if law.outside and noise is not None:
        text = f"noise scale, measured: {_short(noise.tokens)} tokens (Step Law does not reach here: {law.outside[0]})"
        most = tokens / (2 * _FEWEST_STEPS)  # rounded up, the batch may still grow
        if noise.tokens > most:
            notes.append(
                f"a batch as large as the noise scale would leave fewer than {2 * _FEWEST_STEPS} steps; it was cut"
            )
        return min(noise.tokens, most), text, (noise.low, noise.high), notes
    notes += [f"Step Law: {text}" for text in law.outside]
    if law.outside:
        by_law += ", beyond its range; --measure measures instead"
    elif noise is not None and not 0.5 <= noise.tokens / law.value <= 2:
        notes.append(
            f"the noise scale measured after {noise.steps} steps, {_short(noise.tokens)} tokens, is far from "
            f"Step Law's {_short(law.value)}; it grows as the loss falls, so this bounds the critical batch from below"
        )
    return law.value, by_law, (law.low, law.high), notes


def _by_noise(noise: NoiseScale, batch_tokens: int) -> list[Number]:
    """What the chosen batch costs (McCandlish et al. 2018, equations 2.9 and 5.1)."""
    text = f"tr(Sigma)/|G|^2 over the second half of {noise.steps} steps, at loss {noise.loss:.3g}"
    ratio = batch_tokens / noise.tokens
    return [
        Number("noise scale", noise.tokens, "tokens", text, (noise.low, noise.high)),
        Number("tokens over the fewest", 100 * ratio, "%", "batch / noise scale, which estimates the critical batch"),
        Number("steps over the fewest", 100 / ratio, "%", "noise scale / batch"),
    ]


def _planned(
    config: ExperimentConfig, topology: Topology, target: float, global_batch: int | None
) -> tuple[int, Plan, int]:
    """The batch nearest to ``target`` sequences that the machine can cut, its best arrangement, and how many there are.

    Raises:
      UserError: none.
    """
    sizes = {2**k for k in range(40)} | {3 * 2**k for k in range(39)}
    near = sorted((size for size in sizes if 0.5 <= size / target <= 2), key=lambda size: abs(math.log(size / target)))
    first: UserError | None = None
    for size in [global_batch] if global_batch is not None else near or [1]:
        try:
            plans = search(changed(config, {"train.batch_size": size, "train.microbatches": 1}), topology)
            return size, plans[0], len(plans)
        except UserError as error:
            first = first or error
    assert first is not None
    raise first


def _planned_split(plan: Plan, topology: Topology, count: int) -> list[Number]:
    usable = MARGIN * topology.kind.usable_bytes / 2**30
    how = (
        f"planner: predicted fastest of {count} arrangements that fit {topology.name} ({plan.overrides['mesh.layout']})"
    )
    return [
        Number("microbatches", plan.overrides["train.microbatches"], "", how),
        Number(
            "memory per device",
            plan.memory.total / 2**30,
            "GiB",
            f"planner's formula, of {usable:.3g} GiB that it may fill; --check compiles the step",
        ),
        Number("time of a step", plan.latency.total, "s", "planner's model, not measured"),
    ]


def _split_here(
    config: ExperimentConfig, target: float, global_batch: int | None, batch_shards: int
) -> tuple[int, int]:
    """Batch and microbatches: of as many sequences as the experiment's, where the batch is at least as large."""
    rows = config.train.batch_size // config.train.microbatches
    if rows % batch_shards:
        rows = batch_shards
    if global_batch is None:
        part = rows if target >= rows else batch_shards
        batch = max(1, round(target / part)) * part
    else:
        batch = global_batch
    if batch % batch_shards:
        raise UserError(
            f"--global_batch={batch} is not a multiple of the {batch_shards} batch shards of the mesh; use a multiple "
            f"of {batch_shards}"
        )
    microbatches = max(1, math.ceil(batch / rows))
    while batch % (microbatches * batch_shards):
        microbatches += 1
    return batch, microbatches


def _learning_rate(
    config: ExperimentConfig, parameters: int, tokens: int, batch: int, *, scale: bool
) -> tuple[Number, dict[str, Any], list[str]]:
    """The peak rate, the keys that set it and the schedule's end, and notes."""
    name, peak = "peak learning rate", config.optimizer.learning_rate
    schedule, optimizer = config.schedule, config.optimizer.name
    if optimizer == "adamw":
        law = STEP_LAW.peak_lr.at(parameters, tokens)
        factor, source = 1.0, "Step Law, 1.79 N^-0.713 D^0.307"
        if scale:
            best = STEP_LAW.batch_tokens.at(tokens).value
            factor = math.sqrt(batch * config.data.sequence_length / best)
            source += f" = {law.value:.3g} at its own batch, times sqrt(batch / that) = {factor:.3g}"
        value = law.value * factor
        keys = {
            "optimizer.learning_rate": _digits(value),
            "schedule.kind": "cosine",
            "schedule.end_factor": _digits(min(1.0, FINAL_LEARNING_RATE / value)),
        }
        if schedule.batch_scaling != "none":
            keys |= {"schedule.batch_scaling": "none", "schedule.base_batch_size": 0}
        notes = [f"Step Law: {text}" for text in law.outside]
        notes.append(f"Step Law was {STEP_LAW.notes[0]}; the schedule below ends there")
        return Number(name, value, "", source, (law.low * factor, law.high * factor)), keys, notes
    if optimizer in _RATE_FREE:
        return Number(name, peak, "", f"the config's: {optimizer} finds its own rate"), {}, []
    notes = [f"Step Law is AdamW's: for {optimizer} its batch is a guide, and the config's own rate was scaled instead"]
    here = scaled_learning_rate(schedule, peak, config.train.batch_size)
    at = f"the config's {here:.3g} at {config.train.batch_size} sequences"
    if schedule.batch_scaling != "none":
        value = scaled_learning_rate(schedule, peak, batch)
        return Number(name, value, "", f"{at}, by its own schedule.batch_scaling={schedule.batch_scaling}"), {}, notes
    ratio = batch / config.train.batch_size
    if optimizer == "sgd":
        value, rule = here * ratio, "batch / that (Goyal et al. 2017)"
    else:
        value, rule = here * math.sqrt(ratio), "sqrt(batch / that) (LAMB, You et al. 2020)"
    return Number(name, value, "", f"{at}, times {rule}"), {"optimizer.learning_rate": _digits(value)}, notes


def _warmup(config: ExperimentConfig, steps: int) -> Number:
    if config.optimizer.name == "adamw":
        source = f"{_WARMUP_STEPS:,} steps as in Step Law's runs, at most {_WARMUP_SHARE:.0%} of these"
        return Number("warm-up", min(_WARMUP_STEPS, round(_WARMUP_SHARE * steps)), "steps", source)
    own = config.schedule.warmup_steps or round(config.schedule.warmup_fraction * config.train.steps)
    source = f"the config's {own:,} steps, at most {_LAMB_WARMUP_SHARE:.0%} of these (LAMB keeps their number)"
    return Number("warm-up", min(own, round(_LAMB_WARMUP_SHARE * steps)), "steps", source)


def _digits(value: float) -> float:
    return float(f"{value:.3g}")


def _short(value: float) -> str:
    return f"{value:,.0f}" if value < 1e6 else f"{value:.3g}"


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
