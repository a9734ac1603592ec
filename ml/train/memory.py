"""Where a device's memory goes: what the compiler plans, and what the device measured."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ml.models.cost import activation_memory, device_model
from ml.train.config import ExperimentConfig
from ml.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class MemoryUse:
    """Bytes on the fullest device.

    Attributes:
      params, opt_state, ema: arrays that live throughout.
      temporary: gradients, activations and workspace of the compiled step, as the compiler planned them.
      measured_peak: as the device counted so far; ``None`` where the backend does not count.
    """

    params: int
    opt_state: int
    ema: int
    temporary: int
    measured_peak: int | None

    @property
    def predicted(self) -> int:
        """All of it."""
        return self.params + self.opt_state + self.ema + self.temporary

    def __str__(self) -> str:
        parts = {name: getattr(self, name) for name in ("params", "opt_state", "ema", "temporary")}
        text = " + ".join(f"{name.replace('_', ' ')} {size / 2**20:,.0f}" for name, size in parts.items() if size)
        text = f"{self.predicted / 2**20:,.0f} MiB a device = {text}"
        return text if self.measured_peak is None else f"{text}; measured peak {self.measured_peak / 2**20:,.0f}"


def memory_use(state: TrainState, compiled: Any) -> MemoryUse:
    """Reads the plan off a compiled step and off the state that it was compiled for.

    Args:
      state: placed on the mesh.
      compiled: of ``jax.jit(step).lower(...).compile()``.
    """
    plan = compiled.memory_analysis()
    statistics = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [counted["peak_bytes_in_use"] for counted in statistics if "peak_bytes_in_use" in counted]
    return MemoryUse(
        params=bytes_per_device(state.params),
        opt_state=bytes_per_device(state.opt_state),
        ema=bytes_per_device(state.ema),
        temporary=plan.temp_size_in_bytes if plan is not None else 0,
        measured_peak=max(peaks) if peaks else None,
    )


def predicted_activations(config: ExperimentConfig, degrees: Mapping[str, int], dtype: Any) -> int:
    """Bytes of activations on a device, by formula (`ml.models.cost`), known before anything is compiled.

    Args:
      config: the experiment.
      degrees: mesh axis -> degree.
      dtype: of activations.
    """
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


def bytes_per_device(tree: PyTree) -> int:
    """Bytes of the shards that one device holds."""

    def of(x: jax.Array) -> int:
        shape = x.sharding.shard_shape(x.shape)
        size = x.dtype.itemsize
        for extent in shape:
            size *= extent
        return size

    return sum(map(of, jax.tree.leaves(tree)))
