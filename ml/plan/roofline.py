"""The least time that a step can take: by arithmetic, by device memory, by the network; and what binds."""

import dataclasses
from collections.abc import Mapping

from ml.parallel import Rules
from ml.plan.memory import MemoryModel
from ml.plan.topology import Topology
from ml.train.config import ExperimentConfig


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of a step, each at the data sheet's rate; none was measured.

    Attributes:
      compute: matrix products, those computed again included.
      memory: traffic of device memory, by formula.
      network: by the mesh axes along which it goes, joined with ``+``.
      model_flops: of the model alone, forward and backward, on one device.
      peak_flops: of one device.
    """

    compute: float
    memory: float
    network: Mapping[str, float]
    model_flops: float
    peak_flops: float

    @property
    def seconds(self) -> float:
        """If everything overlaps, and transfers along different axes too: the longest term."""
        return max(self.compute, self.memory, *self.network.values(), 0.0)

    @property
    def serial_seconds(self) -> float:
        """If no transfer overlaps anything."""
        return max(self.compute, self.memory) + sum(self.network.values())

    @property
    def binding(self) -> str:
        """The longest term."""
        terms = {"compute": self.compute, "memory": self.memory}
        terms |= {f"network along {axes}": seconds for axes, seconds in self.network.items()}
        return max(terms, key=lambda name: terms[name])

    @property
    def mfu(self) -> float:
        """The upper bound of model FLOPs utilization."""
        return self.model_flops / (self.peak_flops * self.seconds)

    @property
    def serial_mfu(self) -> float:
        """Of `serial_seconds`."""
        return self.model_flops / (self.peak_flops * self.serial_seconds)


def roofline(
    config: ExperimentConfig,
    topology: Topology,
    *,
    computed_flops: float,
    memory_bytes: float,
    network: Mapping[str, float],
) -> Roofline:
    """Puts the terms together.

    Args:
      config: the experiment.
      topology: the machine.
      computed_flops: of all devices together, in a step.
      memory_bytes: that a device reads and writes in a step.
      network: axes -> seconds.
    """
    chip, devices = topology.chip, topology.device_count
    tokens = config.tokens_per_step
    peak = chip.float32_flops if config.train.dtype == "float32" else chip.bf16_flops
    return Roofline(
        compute=computed_flops / devices / peak,
        memory=memory_bytes / chip.memory_bandwidth,
        network=network,
        model_flops=config.flops_per_token * tokens / devices,
        peak_flops=peak,
    )


def memory_traffic(config: ExperimentConfig, rules: Rules, model: MemoryModel, itemsize: int = 2) -> float:
    """Bytes that a device reads and writes in a step, by formula: weights, activations, gradients, optimizer.

    Each pass over a microbatch (forward, once more under rematerialization, backward) reads the weights that the device
    multiplies by, the backward pass twice, and writes their gradients once. A layer's activations are written and read
    in each pass. The optimizer reads and writes what it keeps. Caches are not counted on.
    """
    held, train = model.predict(config, rules, itemsize), config.train
    whole = dataclasses.replace(rules, layout="ddp")
    weights = model.weight_bytes(whole, "compute", itemsize)
    again = 0 if train.remat == "none" else 1
    one = dataclasses.replace(config, train=dataclasses.replace(train, remat="none"))
    everything = model.predict(one, rules, itemsize).activations
    params, opt_state = model.state_bytes(rules)
    per_microbatch = weights * (3 + again) + weights + 2 * everything * (2 + again) + 2 * held.gradients
    return train.microbatches * per_microbatch + 3 * params + 2 * opt_state + held.gradients
