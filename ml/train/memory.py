"""Where a device's memory goes: what the compiler plans, and what the device measured."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import PyTree

from ml.train.config import ExperimentConfig
from ml.train.kinds import kind_of
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
    """Bytes of activations on a device, by formula, known before anything is compiled.

    Args:
      config: the experiment.
      degrees: mesh axis -> degree.
      dtype: of activations.
    """
    return kind_of(config.model).activations(config, degrees, dtype)


def bytes_per_device(tree: PyTree) -> int:
    """Bytes of the shards that one device holds."""

    def of(x: jax.Array) -> int:
        shape = x.sharding.shard_shape(x.shape)
        size = x.dtype.itemsize
        for extent in shape:
            size *= extent
        return size

    return sum(map(of, jax.tree.leaves(tree)))
