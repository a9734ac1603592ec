"""What training has to know of each kind of model: the data it learns from, what must fit, what it costs.

A further kind is a `Kind` in a file of its own and a line in `KINDS`, besides its module (`ml.models.build`), its
objective (`ml.train.objective`) and its data (`ml.data.kinds`).
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from ml.config import to_dict
from ml.data import DataConfig, ImageDataConfig, ImageTextDataConfig
from ml.errors import UserError
from ml.models import ResNetConfig, TransformerConfig, TwoTowerConfig
from ml.parallel import Rules
from ml.train import image_kind, image_text_kind, transformer_kind
from ml.train.initial import Initial, initial_resnet, initial_transformer, initial_two_tower

# An `ml.train.config.ExperimentConfig`, which checks itself by what is here.
Experiment = Any


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of model, as training sees it.

    Attributes:
      data: class of the data's configuration.
      unit: what a loss is averaged over and speed is counted in: ``tokens``, ``images``, ``pairs``.
      units: experiment -> how many of them a full row has.
      check: refuses an experiment whose parts do not fit one another.
      check_mesh: refuses a mesh that cannot cut the model or its data.
      check_data: ``(experiment, prepared data)``: refuses data that the model cannot take.
      initial: parts of a run -> parameters of the model that ``train.init_from`` names, and their running statistics.
      fields: experiment -> attributes of the module besides ``dtype``, ``remat`` and ``place``.
      lookahead: experiment -> names of the arrays of which a step wants to see the next batch's too.
      flops: experiment -> FLOPs of the model, forward and backward, for each of its units.
      activations: ``(experiment, degrees of the mesh, dtype) -> bytes`` on a device, by formula.
    """

    data: type
    unit: str
    units: Callable[[Experiment], int]
    check: Callable[[Experiment], None]
    check_mesh: Callable[[Experiment, Rules], None]
    check_data: Callable[[Experiment, Any], None]
    initial: Callable[[Any], Initial]
    fields: Callable[[Experiment], dict[str, Any]]
    lookahead: Callable[[Experiment], tuple[str, ...]]
    flops: Callable[[Experiment], float]
    activations: Callable[[Experiment, Mapping[str, int], Any], int]


def _kind(data: type, unit: str, module: ModuleType, initial: Callable[[Any], Initial]) -> Kind:
    """The functions of ``module``, by their names; what a batch looks ahead for is nothing unless it says so."""
    own = {field.name: getattr(module, field.name) for field in dataclasses.fields(Kind) if hasattr(module, field.name)}
    return Kind(**{"lookahead": lambda config: (), **own, "data": data, "unit": unit, "initial": initial})


KINDS: Mapping[type, Kind] = {
    TransformerConfig: _kind(DataConfig, "tokens", transformer_kind, initial_transformer),
    ResNetConfig: _kind(ImageDataConfig, "images", image_kind, initial_resnet),
    TwoTowerConfig: _kind(ImageTextDataConfig, "pairs", image_text_kind, initial_two_tower),
}


def kind_of(model: Any) -> Kind:
    """The kind of an architecture, by the class of its configuration."""
    return KINDS[type(model)]


def check_reads_text(config: Experiment, what: str) -> None:
    """Refuses models of images: ``what`` counts in tokens and layers of a transformer.

    Raises:
      UserError: names the model's kind, and what serves it.
    """
    if not isinstance(config.model, TransformerConfig):
        raise UserError(
            f"config.model.kind={config.model.kind!r}: {what} knows transformers that read text alone; try a mesh and "
            "a batch of your choice with scripts/preflight.py"
        )


def check_experiment(config: Experiment) -> None:
    """Refuses an experiment whose model, data and training do not fit one another.

    Raises:
      UserError: names the fields.
    """
    kind = kind_of(config.model)
    if not isinstance(config.data, kind.data):
        wanted, given = (to_dict(data).get("kind") for data in (kind.data(), config.data))
        raise UserError(
            f"config.data.kind={given!r} is not what config.model learns from: set config.data to a group of kind "
            f"{wanted!r}, or choose another config.model"
            if wanted
            else f"config.data.kind={given!r} is not what config.model learns from: set config.data to text, without a "
            "kind, or choose another config.model"
        )
    kind.check(config)
