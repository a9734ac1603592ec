"""How long a step would take: a model for ranking arrangements, not for promising times.

Compute runs at an assumed share of the data sheet's peak. Gathers and reductions of weights, and the ring of context
parallelism, overlap with it; transfers that a layer waits for (tensor and expert parallelism) do not. Pipelines follow
Pipette's corrected critical path of 1F1B.
"""

import dataclasses
import functools
from collections.abc import Callable

from ml.models.cost import visible_keys
from ml.parallel import LAYOUTS, Rules
from ml.plan.links import bandwidth, grid
from ml.plan.memory import MemoryModel
from ml.plan.topology import Topology
from ml.train.config import ExperimentConfig

_ITEMSIZE = 2
# Products of a layer's forward pass are a third of the step's; rematerialization does them again.
_FORWARD = 1 / 3
# Of what overlaps, the part that shows all the same: links and memory are shared with the computation.
_SHOWS = 0.1


@dataclasses.dataclass(frozen=True)
class Latency:
    """Seconds of a step, predicted.

    Attributes:
      compute: matrix products at the assumed rate.
      weights: gathering weights and reducing gradients while layers compute.
      activations: transfers that layers wait for, and the ring's.
      once: transfers once a step.
      bubble: stages waiting.
      total: with what overlaps taken into account.
    """

    compute: float
    weights: float
    activations: float
    once: float
    bubble: float
    total: float


def bubble_share(stages: int, microbatches: int, chunks: int = 1) -> float:
    """Share of a pipelined step that a stage waits: ``(p - 1) / (m v + p - 1)`` (Narayanan et al. 2021, 2.2)."""
    return (stages - 1) / (microbatches * chunks + stages - 1)


def pipeline_seconds(stages: int, microbatches: int, one: float, hop: float, chunks: int = 1) -> float:
    """Critical path of 1F1B, transfers between stages on it (Pipette; Yim et al. 2024).

    Args:
      stages: of the pipeline.
      microbatches: in a step.
      one: seconds of one stage with one microbatch, forward and backward.
      hop: seconds to hand one microbatch to the next stage.
      chunks: of layers in each stage (interleaved schedule), by which filling and draining shrink.
    """
    through, between = stages * one, 2 * (stages - 1) * hop
    if microbatches >= stages:
        rounds, rest = divmod(microbatches, stages)
        return rounds * (through + between) + rest * one + (stages - 1) * one / chunks
    return through + between + (microbatches - 1) * one


class LatencyModel:
    """Predicts steps of one experiment on one topology under many meshes."""

    def __init__(self, topology: Topology, model: MemoryModel, efficiency: float):
        self._topology, self._memory, self._efficiency = topology, model, efficiency
        self._rate = functools.lru_cache(maxsize=None)(self._bandwidth)

    def _bandwidth(self, degrees: tuple[tuple[str, int], ...], axes: tuple[str, ...]) -> float:
        return bandwidth(self._topology, grid(self._topology, dict(degrees)), axes)

    def predict(self, config: ExperimentConfig, rules: Rules) -> Latency:
        """The step of ``config`` laid out by ``rules``."""
        train, mesh = config.train, dict(rules.mesh.shape)
        named = tuple(mesh.items())
        microbatches, stages = train.microbatches, mesh["stage"]

        def seconds(size: float, *axes: str) -> float:
            used = tuple(axis for axis in axes if mesh[axis] > 1)
            return size / self._rate(named, used) if used else 0.0

        compute = self._compute(config) / microbatches
        weights, once = self._weights(rules, mesh, microbatches, seconds)
        waited, ring = self._activations(config, mesh, seconds)
        one = max(compute, weights + ring) + _SHOWS * min(compute, weights + ring) + waited
        hop = seconds(self._residual(config, mesh), "stage")
        steady = pipeline_seconds(stages, microbatches, one, hop, train.pipeline_chunks)
        return Latency(
            compute=microbatches * compute,
            weights=microbatches * weights,
            activations=microbatches * (waited + ring),
            once=once,
            bubble=steady - microbatches * one,
            total=steady + once,
        )

    def _compute(self, config: ExperimentConfig) -> float:
        c, length = config.model, config.data.sequence_length
        tokens = config.train.batch_size * length
        flops = config.flops_per_token
        # The kernels' backward pass multiplies once more than two products each: their scores are computed again.
        seen = length if c.encoder else visible_keys(length, c.sliding_window)
        attention = 2.0 * 2 * c.num_heads * c.head_dim * c.num_layers * seen
        unembedding = 2.0 * c.embed_dim * c.vocab_size * config.data.predictions / length
        again = {"none": 0.0, "dots": 0.0, "dots_no_batch": attention}.get(
            config.train.remat, _FORWARD * flops - unembedding
        )
        peak = self._topology.chip.bf16_flops * self._efficiency
        return (flops + again + 1.5 * attention) * tokens / self._topology.device_count / peak

    def _weights(
        self, rules: Rules, mesh: dict[str, int], microbatches: int, seconds: Callable[..., float]
    ) -> tuple[float, float]:
        """Seconds for each microbatch and once a step.

        Gathered layer by layer (forward, and again backward) or once; reduced by scattering where gradients are cut,
        else once a step, in float32, along the axes that hold whole copies.
        """
        layout = LAYOUTS[rules.layout]
        whole = dataclasses.replace(rules, layout="ddp")
        size = self._memory.weight_bytes(whole, "compute", _ITEMSIZE)
        shard = self._memory.weight_bytes(rules, "gradients", _ITEMSIZE)

        def cut(axes: tuple[str, ...]) -> float:
            parts = 1
            for axis in axes:
                parts *= mesh[axis]
            return (parts - 1) / parts

        each = once = 0.0
        if layout.compute:
            each += 2 * seconds(size * cut(layout.compute), *layout.compute)
        elif layout.state:
            once += seconds(size * cut(layout.state), *layout.state)
        if layout.gradients:
            each += seconds(2 * size * cut(layout.gradients), *layout.gradients)  # float32
        copies = tuple(axis for axis in ("data", "fsdp", "expert", "sequence") if axis not in layout.gradients)
        if layout.gradients:  # already scattered, float32, once a step
            once += seconds(2 * 2 * shard * cut(copies), *copies)
        else:
            once += seconds((2 if not layout.state else 1) * 2 * size * cut(copies), *copies)
        return each, once

    def _activations(
        self, config: ExperimentConfig, mesh: dict[str, int], seconds: Callable[..., float]
    ) -> tuple[float, float]:
        """Seconds of one microbatch that layers wait for, and of the ring."""
        c, layers = config.model, config.model.num_layers // mesh["stage"]
        passes = 2 if config.train.remat in ("none", "dots", "dots_no_batch") else 3
        residual = self._residual(config, mesh)
        tensor, sequence, expert = mesh["tensor"], mesh["sequence"], mesh["expert"]
        # Two all-reduces (or as many bytes in gathers and scatters) a layer and pass (Shoeybi et al. 2019, section 3).
        waited = passes * 2 * layers * seconds(2 * (tensor - 1) / tensor * residual, "tensor")
        if c.moe is not None and expert > 1:  # there and back
            waited += passes * 2 * layers * seconds((expert - 1) / expert * c.moe.top_k * residual, "expert")
        keys = residual / c.embed_dim * 2 * c.num_kv_heads * c.head_dim / tensor
        ring = (passes + 1) * layers * seconds((sequence - 1) * keys, "sequence")
        return waited, ring

    def _residual(self, config: ExperimentConfig, mesh: dict[str, int]) -> float:
        """Bytes of a microbatch's residual stream on a device."""
        shards = mesh["data"] * mesh["fsdp"] * mesh["expert"] * mesh["sequence"] * config.train.microbatches
        tokens = config.train.batch_size * config.data.sequence_length / shards
        return tokens * config.model.embed_dim * _ITEMSIZE
