"""Searches the arrangements of an experiment on a machine: those that fit, by predicted time."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from ml.errors import UserError
from ml.parallel import AXES, Rules
from ml.plan.latency import Latency, LatencyModel
from ml.plan.memory import Memory, MemoryModel, abstract_rules
from ml.plan.topology import GPUS_PER_NODE, Topology
from ml.train.config import ExperimentConfig
from ml.train.kinds import check_reads_text

# Of a device's memory, what a plan may be predicted to need: the formula errs by up to this much.
MARGIN = 0.85
# Beyond these degrees transfers that layers wait for leave the fast links, or parts become too thin to multiply well.
_LIMITS = {"tensor": 16, "sequence": 16, "stage": 16}
_REMATS = ("none", "dots_no_batch", "full")


@dataclasses.dataclass(frozen=True)
class Plan:
    """One arrangement.

    Attributes:
      overrides: keys of the experiment that make it.
      memory: predicted, of a device.
      latency: predicted, of a step.
      mfu: that this would be.
    """

    overrides: dict[str, Any]
    memory: Memory
    latency: Latency
    mfu: float

    @property
    def flags(self) -> str:
        """To paste after a command."""
        return " ".join(f"--config.{key}={str(value).lower()}" for key, value in self.overrides.items())


def search(config: ExperimentConfig, topology: Topology, *, efficiency: float = 0.6) -> list[Plan]:
    """All arrangements that fit, fastest first.

    Args:
      config: the experiment; its mesh, microbatches and remat are what is sought.
      topology: the machine.
      efficiency: share of the data sheet's peak at which matrix products are assumed to run.

    Raises:
      UserError: none fits; the model is no transformer of text.
    """
    check_reads_text(config, "the planner")
    model = MemoryModel(config)
    latency = LatencyModel(topology, model, efficiency)
    tokens = config.tokens_per_step
    flops = config.flops_per_token * tokens / topology.device_count
    plans, tightest = [], math.inf
    for degrees, layout in _meshes(config, topology):
        rules = abstract_rules(tuple(degrees[axis] for axis in AXES), layout)
        if not _divides(config, model, rules, degrees):
            continue
        for candidate in _settings(config, degrees, layout, topology.slices):
            memory = model.predict(candidate, rules)
            tightest = min(tightest, memory.total)
            if memory.total > MARGIN * topology.kind.usable_bytes:
                continue
            predicted = latency.predict(candidate, rules)
            mfu = flops / (predicted.total * topology.chip.bf16_flops)
            plans.append(Plan(_overrides(candidate, config), memory, predicted, mfu))
    if not plans:
        if math.isinf(tightest):
            raise UserError(
                f"--topology={topology.name}: no mesh of {topology.device_count} devices divides the model and the "
                f"batch of {config.train.batch_size}; choose a batch that is a multiple of a power of two"
            )
        raise UserError(
            f"--topology={topology.name}: no arrangement fits; the smallest needs {tightest / 2**30:.1f} of "
            f"{MARGIN * topology.kind.usable_bytes / 2**30:.1f} GiB a device; choose more devices"
        )
    return sorted(plans, key=_rank)


def _rank(plan: Plan) -> tuple[int, int, int, float]:
    """By time; within a percent, which is less than the model errs, the simpler mesh and fewer microbatches."""
    special = sum(f"mesh.{axis}" in plan.overrides for axis in ("tensor", "sequence", "expert", "stage"))
    nearest_percent = round(math.log(plan.latency.total) / math.log(1.01))
    return nearest_percent, special, plan.overrides["train.microbatches"], plan.memory.total


def _meshes(config: ExperimentConfig, topology: Topology) -> Iterator[tuple[dict[str, int], str]]:
    """Degrees whose product is the number of devices, each with the layouts that differ on them."""
    count = topology.device_count
    tensor_limit = min(_LIMITS["tensor"], GPUS_PER_NODE) if topology.platform == "gpu" else _LIMITS["tensor"]
    experts = config.model.moe.num_experts if config.model.moe else 1
    for tensor in _divisors(count, tensor_limit):
        for sequence in _divisors(count // tensor, _LIMITS["sequence"]):
            for expert in _divisors(count // (tensor * sequence), experts):
                for stage in _divisors(count // (tensor * sequence * expert), _LIMITS["stage"]):
                    rest = count // (tensor * sequence * expert * stage)
                    for fsdp in _divisors(rest, rest):
                        degrees = {"stage": stage, "data": rest // fsdp, "fsdp": fsdp, "expert": expert}
                        degrees |= {"sequence": sequence, "tensor": tensor}
                        if degrees["data"] % topology.slices:
                            continue
                        if fsdp * expert * sequence > 1:
                            yield degrees, "hybrid"  # without replicas along `data` this is ZeRO-3
                        if fsdp == 1:
                            yield from ((degrees, layout) for layout in ("ddp", "zero1", "zero2"))


def _divides(config: ExperimentConfig, model: MemoryModel, rules: Rules, degrees: dict[str, int]) -> bool:
    length = config.data.sequence_length
    if config.model.encoder is not None and degrees["stage"] * degrees["sequence"] > 1:
        return False
    if length % (2 * degrees["sequence"] if degrees["sequence"] > 1 else 1):
        return False
    try:
        for kind in ("state", "compute", "gradients"):
            names = {key: leaf.axes for key, leaf in model.params.items()}
            rules.shardings(names, dict(model.params), kind)  # type: ignore[arg-type]
    except (UserError, ValueError):  # the layout cannot, or does not yet, cut this model along these axes
        return False
    return True


def _settings(
    config: ExperimentConfig, degrees: dict[str, int], layout: str, slices: int
) -> Iterator[ExperimentConfig]:
    """Microbatches and rematerialization for a mesh."""
    shards = degrees["data"] * degrees["fsdp"] * degrees["expert"]
    batch = config.train.batch_size
    changes: dict[str, Any] = {**degrees, "layout": layout, "slices": slices, "sequence_residual": False}
    mesh = dataclasses.replace(config.mesh, **changes)
    for microbatches in _divisors(batch // shards if batch % shards == 0 else 0, batch):
        if microbatches < degrees["stage"]:
            continue
        for remat in _REMATS:
            train = dataclasses.replace(config.train, microbatches=microbatches, remat=remat)  # type: ignore[arg-type]
            yield dataclasses.replace(config, train=train, mesh=mesh)


def _overrides(candidate: ExperimentConfig, config: ExperimentConfig) -> dict[str, Any]:
    """What differs from the base of `configs/`, in full, so that it may follow any command."""
    mesh = {f"mesh.{axis}": getattr(candidate.mesh, axis) for axis in AXES}
    mesh = {key: value for key, value in mesh.items() if value != 1 or key in ("mesh.data", "mesh.fsdp")}
    for axis in AXES:  # the experiment itself may have set them
        if getattr(config.mesh, axis) != 1:
            mesh[f"mesh.{axis}"] = getattr(candidate.mesh, axis)
    train = {"train.microbatches": candidate.train.microbatches, "train.remat": candidate.train.remat}
    if candidate.train.batch_size != config.train.batch_size:
        train["train.batch_size"] = candidate.train.batch_size
    slices = {"mesh.slices": candidate.mesh.slices} if candidate.mesh.slices > 1 else {}
    return {**mesh, "mesh.layout": candidate.mesh.layout, **slices, **train}


def _divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]
