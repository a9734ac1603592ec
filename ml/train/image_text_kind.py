"""Models of images and texts as training sees them: what must fit, and what they cost."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from ml.data import check_vocab
from ml.errors import UserError
from ml.models.two_tower_cost import activation_memory, forward_flops, loss_memory
from ml.parallel import Rules

# An `ml.train.config.ExperimentConfig`, which checks itself by what is here.
Experiment = Any

# Settings of `TrainConfig` that these models do not have, and their values that do nothing.
_NOT_OURS = {
    "dropout": 0.0,
    "label_smoothing": 0.0,
    "z_loss": 0.0,
    "noise_scale": False,
    "adversarial": "none",
}


def check(config: Experiment) -> None:
    """Refuses pairs that the towers do not take, and settings that they do not have.

    Raises:
      UserError: names the fields.
    """
    model, data, train = config.model, config.data, config.train
    for name, value in _NOT_OURS.items():
        if getattr(train, name) != value:
            raise UserError(
                f"config.train.{name}={getattr(train, name)} is not for models of images and texts; set it to {value!r}"
            )
    for name in ("image_size", "channels"):
        if getattr(data, name) != getattr(model.image, name):
            raise UserError(
                f"config.data.{name}={getattr(data, name)}, but config.model.image.{name}="
                f"{getattr(model.image, name)}; make them equal"
            )
    if data.text_length > model.text.max_length:
        raise UserError(
            f"config.data.text_length={data.text_length} is longer than config.model.text.max_length="
            f"{model.text.max_length}; lower the one or raise the other"
        )


def check_mesh(config: Experiment, rules: Rules) -> None:
    """Refuses axes that cut no such model.

    Raises:
      UserError: names the axis.
    """
    shape = rules.mesh.shape
    if axis := next((a for a in ("stage", "sequence") if shape[a] > 1), None):
        raise UserError(
            f"config.mesh.{axis}={shape[axis]} cuts no model of images and texts; use data, fsdp and tensor instead"
        )
    if config.mesh.sequence_residual:
        raise UserError("config.mesh.sequence_residual cuts no model of images and texts; set it to False")


def check_data(config: Experiment, prepared: Any) -> None:
    """Refuses a tokenizer with more entries than the text tower's embedding has rows.

    Raises:
      UserError: names both numbers.
    """
    check_vocab(prepared.tokenizer, config.model.text.vocab_size)


def fields(config: Experiment) -> dict[str, Any]:
    """How the towers attend."""
    return {"attention": config.train.attention}


def units(config: Experiment) -> int:
    """A row is a pair."""
    del config
    return 1


def flops(config: Experiment) -> float:
    """FLOPs of the model, forward and backward, for each pair; what is embedded twice counts once."""
    return 3.0 * forward_flops(config.model, config.data.text_length, config.train.batch_size)


def activations(config: Experiment, degrees: Mapping[str, int], dtype: Any) -> int:
    """Bytes of activations on a device, by formula: of a microbatch, or of the loss, whichever is more."""
    train, shards = config.train, degrees["data"] * degrees["fsdp"] * degrees["expert"]
    blocked = train.attention in ("xla", "reference") or (train.attention == "auto" and jnp.dtype(dtype).itemsize == 4)
    held = activation_memory(
        config.model,
        rows=train.batch_size // (train.microbatches * shards),
        text_length=config.data.text_length,
        remat=train.remat,
        dtype=dtype,
        attention="xla" if blocked else "kernel",
    )
    return max(held.total, loss_memory(config.model, batch=train.batch_size, shards=shards, block=train.loss_chunk))
