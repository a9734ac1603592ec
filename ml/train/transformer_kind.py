"""Transformers as training sees them: what must fit, and what they cost."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from ml.data import check_vocab
from ml.errors import UserError
from ml.models.cost import activation_memory, device_model, train_flops_per_token
from ml.models.moe import check_experts
from ml.parallel import Rules
from ml.parallel.context import check_length
from ml.parallel.pipeline_schedule import check_pipeline

# An `ml.train.config.ExperimentConfig`, which checks itself by what is here.
Experiment = Any


def check(config: Experiment) -> None:
    """Refuses an encoder without its data, a decoder with an encoder's, and rows longer than the model.

    Raises:
      UserError: names the fields.
    """
    model, data = config.model, config.data
    encoder = model.encoder
    if (encoder is not None) != data.for_encoder:
        mend = "an encoder: set one of" if encoder else "no encoder: unset"
        raise UserError(f"config.model is {mend} config.data.masked (pairs of sentences) and config.data.labelled")
    if encoder is None and config.train.dropout:
        raise UserError(f"config.train.dropout={config.train.dropout} is for encoders only; set it to 0")
    for name, none in (("label_smoothing", 0.0), ("adversarial", "none")):
        if getattr(config.train, name) != none:
            raise UserError(
                f"config.train.{name}={getattr(config.train, name)} is for image models; set it to {none!r}"
            )
    labels = len(data.labelled.labels) if data.labelled else 0
    if encoder is not None and encoder.num_classes != labels:
        raise UserError(
            f"config.model.encoder.num_classes={encoder.num_classes}, but config.data.labelled has {labels} "
            "labels; make them equal (0 for pre-training)"
        )
    if data.sequence_length > model.max_length:
        raise UserError(
            f"config.data.sequence_length={data.sequence_length} is longer than the model's "
            f"config.model.max_length={model.max_length}; lower the one or raise the other"
        )


def check_mesh(config: Experiment, rules: Rules) -> None:
    """Refuses what the mesh cannot cut evenly: rows, experts and layers.

    Raises:
      UserError: names the numbers and a valid choice.
    """
    model, shape = config.model, rules.mesh.shape
    if model.encoder is not None and (axis := next((a for a in ("stage", "sequence") if shape[a] > 1), None)):
        raise UserError(f"config.mesh.{axis}={shape[axis]} cuts no encoder; use data, fsdp and tensor instead")
    check_length(config.data.sequence_length, shape["sequence"], rules.sequence_order)
    check_experts(model, shape)
    if shape["stage"] > 1:
        check_pipeline(
            num_layers=model.num_layers,
            stages=shape["stage"],
            chunks=config.train.pipeline_chunks,
            microbatches=config.train.microbatches,
        )


def check_data(config: Experiment, prepared: Any) -> None:
    """Refuses a tokenizer with more entries than the embedding has rows.

    Raises:
      UserError: names both numbers.
    """
    check_vocab(prepared.tokenizer, config.model.vocab_size)


def fields(config: Experiment) -> dict[str, Any]:
    """An encoder's dropout."""
    return {} if config.model.encoder is None else {"dropout": config.train.dropout}


def units(config: Experiment) -> int:
    """Tokens."""
    return config.data.sequence_length


def flops(config: Experiment) -> float:
    """FLOPs of the model, forward and backward, for each token of a full row."""
    return train_flops_per_token(config.model, config.data.sequence_length, config.data.predictions)


def activations(config: Experiment, degrees: Mapping[str, int], dtype: Any) -> int:
    """Bytes of activations on a device, by formula (`ml.models.cost`)."""
    train = config.train
    rows = train.batch_size // (train.microbatches * degrees["data"] * degrees["fsdp"] * degrees["expert"])
    length = config.data.sequence_length // degrees["sequence"]
    blocked = train.attention in ("xla", "reference") or (train.attention == "auto" and jnp.dtype(dtype).itemsize == 4)
    outputs = min(config.data.predictions, length)
    held = activation_memory(
        device_model(config.model, degrees),
        batch=rows,
        length=length,
        remat=train.remat,
        dtype=dtype,
        attention="xla" if blocked else "kernel",
        logit_tokens=rows * min(train.loss_chunk or outputs, outputs),
        expert_degree=degrees["expert"],
    )
    in_flight = 1
    if degrees["stage"] > 1:  # 1F1B keeps as many microbatches in flight as there are stages
        in_flight = train.microbatches if train.pipeline == "gpipe" else min(degrees["stage"], train.microbatches)
    saved = held.saved * in_flight
    if config.mesh.sequence_residual and train.remat == "full":
        saved //= degrees["tensor"]
    return saved + max(held.block, held.head)
