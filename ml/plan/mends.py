"""Changes to an experiment by which it might fit, each checked by formula."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from ml.config import build, to_dict
from ml.errors import UserError
from ml.parallel import AXES
from ml.plan.memory import MemoryModel, abstract_rules
from ml.train.config import ExperimentConfig
from ml.train.setup import check_fit

Overrides = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Mend:
    """A change.

    Attributes:
      overrides: key of the experiment, such as ``train.remat`` -> value.
      bytes: that a device would then need, as predicted.
    """

    overrides: Overrides
    bytes: float

    def __str__(self) -> str:
        return " ".join(f"--config.{key}={_text(value)}" for key, value in self.overrides.items())


def changed(config: ExperimentConfig, overrides: Overrides) -> ExperimentConfig:
    """The experiment with some keys changed.

    Raises:
      UserError: the result is no valid experiment.
    """
    values = to_dict(config)
    for name, value in overrides.items():
        *groups, key = name.split(".")
        group = values
        for part in groups:
            group = group[part]
        group[key] = value
    return build(ExperimentConfig, values)


def mends(config: ExperimentConfig, devices: int, *, needed: float, available: float, most: int = 4) -> list[Mend]:
    """Changes by which ``config`` might fit: single ones, or pairs if no single one does; least memory first.

    Args:
      config: an experiment that does not fit.
      devices: of the machine.
      needed: bytes that a device needs now, as compiled; the formula is scaled to it.
      available: bytes that it has.
      most: how many to return.
    """
    model = MemoryModel(config)
    scale = needed / _predict(model, config, devices)
    single = [dict(change) for change in _changes(config, devices)]
    found: dict[str, Mend] = {}
    for count in (1, 2):
        for parts in itertools.combinations(single, count):
            overrides = {key: value for part in parts for key, value in part.items()}
            if sum(map(len, parts)) > len(overrides):  # both change the same key
                continue
            try:
                size = scale * _predict(model, changed(config, overrides), devices)
            except UserError:
                continue
            mend = Mend(overrides, size)
            if size <= available:
                found[str(mend)] = mend
        if found:
            break
    return sorted(found.values(), key=lambda mend: mend.bytes)[:most]


def _predict(model: MemoryModel, config: ExperimentConfig, devices: int) -> float:
    rules = rules_of(config, devices)
    check_fit(config, rules)
    rules.shardings({key: leaf.axes for key, leaf in model.params.items()}, dict(model.params))
    return model.predict(config, rules).total


def rules_of(config: ExperimentConfig, devices: int) -> Any:
    """The experiment's layout on a mesh of that many devices, none of which is there."""
    sizes = config.mesh.fitted(devices)
    return abstract_rules(tuple(sizes[name] for name in AXES), config.mesh.layout, config.mesh.sequence_residual)


def _changes(config: ExperimentConfig, devices: int) -> Iterator[Overrides]:
    """What a user would try, one thing at a time."""
    train, mesh, sizes = config.train, config.mesh, config.mesh.fitted(devices)
    for factor in (2, 4, 8, 16):
        yield {"train.microbatches": train.microbatches * factor}
    for remat in ("dots_no_batch", "full", "offload"):
        if remat != train.remat:
            yield {"train.remat": remat}
    if not train.loss_chunk or train.loss_chunk > 512:
        yield {"train.loss_chunk": 512}
    if mesh.layout != "zero3":
        yield {"mesh.layout": "zero3"}
    if sizes["data"] > 1:
        yield {"mesh.data": 1, "mesh.fsdp": sizes["data"] * sizes["fsdp"]}
    for axis in ("tensor", "sequence", "expert"):
        for factor in (2, 4, 8):
            for source in ("data", "fsdp"):
                if sizes[source] % factor == 0 and (axis != "expert" or config.model.moe):
                    yield {f"mesh.{source}": sizes[source] // factor, f"mesh.{axis}": sizes[axis] * factor}
    if sizes["tensor"] > 1 and not mesh.sequence_residual:
        yield {"mesh.sequence_residual": True}
    if not train.offload_optimizer:
        yield {"train.offload_optimizer": True}


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
