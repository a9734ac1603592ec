"""Image classifiers as training sees them: what must fit, and what they cost."""

from collections.abc import Mapping
from typing import Any

from ml.errors import UserError
from ml.models.resnet import REMAT_POLICIES
from ml.models.resnet_cost import activation_memory, forward_flops
from ml.parallel import Rules

# An `ml.train.config.ExperimentConfig`, which checks itself by what is here.
Experiment = Any

# Settings of `TrainConfig` that image classifiers do not have, and their values that do nothing.
_NOT_OURS = {"dropout": 0.0, "z_loss": 0.0, "loss_chunk": 0}


def check(config: Experiment) -> None:
    """Refuses images that the model does not take, and settings that it does not have.

    Raises:
      UserError: names the fields.
    """
    model, data, train = config.model, config.data, config.train
    for name, value in _NOT_OURS.items():
        if getattr(train, name) != value:
            raise UserError(f"config.train.{name}={getattr(train, name)} is not for image models; set it to {value!r}")
    if train.remat not in REMAT_POLICIES:
        known = ", ".join(REMAT_POLICIES)
        raise UserError(f"config.train.remat={train.remat} is for transformers; an image model takes one of {known}")
    if data.channels != model.channels:
        raise UserError(
            f"config.data.channels={data.channels}, but config.model.channels={model.channels}; make them equal"
        )
    rows, group = train.batch_size // train.microbatches, model.batch_norm_group
    if group and rows % group:
        raise UserError(
            f"config.model.batch_norm_group={group} does not divide the {rows} rows of a microbatch; choose a divisor, "
            "or 0 for the statistics of all of them"
        )


def check_mesh(config: Experiment, rules: Rules) -> None:
    """Refuses axes that cut no image model, and groups of batch norm that span replicas.

    Raises:
      UserError: names the numbers.
    """
    shape = rules.mesh.shape
    if axis := next((a for a in ("stage", "sequence", "tensor") if shape[a] > 1), None):
        raise UserError(f"config.mesh.{axis}={shape[axis]} cuts no image model; use data or fsdp instead")
    rows = config.train.batch_size // config.train.microbatches // rules.batch_shards
    group = config.model.batch_norm_group
    if group and rows % group:
        raise UserError(
            f"config.model.batch_norm_group={group} does not divide the {rows} rows of a microbatch on each replica; "
            "choose a divisor, or 0 for the statistics of all replicas"
        )


def check_data(config: Experiment, prepared: Any) -> None:
    """Refuses data with more classes than the model has outputs.

    Raises:
      UserError: names both numbers.
    """
    classes = len(prepared.classes)
    if classes > config.model.num_classes:
        raise UserError(
            f"config.model.num_classes={config.model.num_classes}, but config.data has {classes} classes; set it to "
            f"{classes}"
        )


def fields(config: Experiment) -> dict[str, Any]:
    """There are none."""
    del config
    return {}


def units(config: Experiment) -> int:
    """A row is an image."""
    del config
    return 1


def lookahead(config: Experiment) -> tuple[str, ...]:
    """What a concurrent attack is made from."""
    return ("images", "targets") if config.train.adversarial == "concurrent" else ()


# Passes over an image, where one backward is two forward: clean; and attacked; and the attack, whose backward pass has
# no gradient of weights.
_PASSES = {"none": 3.0, "noise": 6.0, "sequential": 8.0, "concurrent": 8.0}


def flops(config: Experiment) -> float:
    """FLOPs of the model, forward and backward, for each image, adversarial ones included."""
    return _PASSES[config.train.adversarial] * forward_flops(config.model, config.data.image_size)


def activations(config: Experiment, degrees: Mapping[str, int], dtype: Any) -> int:
    """Bytes of activations on a device, by formula (`ml.models.resnet_cost`)."""
    train = config.train
    rows = train.batch_size // (train.microbatches * degrees["data"] * degrees["fsdp"] * degrees["expert"])
    held = activation_memory(config.model, rows=rows, image_size=config.data.image_size, remat=train.remat, dtype=dtype)
    halves = 1 if train.adversarial == "none" else 2  # clean and attacked images are both kept for the backward pass
    return halves * held.saved + held.block
