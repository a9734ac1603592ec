"""Which part of which microbatch each pipeline stage computes, and when: GPipe, 1F1B and their interleaved forms.

The layers are cut into ``chunks * stages`` equal runs. Run ``k = chunk * stages + stage`` lies on ``stage``, so that a
microbatch travels round the ring of stages ``chunks`` times. All stages march in step: in one *tick* a stage computes
at most one *forward unit* and then at most one *backward unit* (one run of layers on one microbatch each), and hands
the result to its neighbour for the next tick. With ``p`` stages, ``v`` chunks, and microbatch ``g p + j`` (``j < p``),

    forward unit   u = g p v + c p + j            runs on stage s at tick u + s,
    backward unit  w = g p v + (v - 1 - c) p + j  runs on stage s at tick T + w + (p - 1 - s),

where ``T`` is ``v p - 1`` for 1F1B (Narayanan et al. 2019, PipeDream-Flush: a microbatch turns round as soon as it has
left the last layer) and the number of forward ticks for GPipe (Huang et al. 2019: all forward, then all backward). The
interleaving is that of Narayanan et al. 2021 (Megatron-LM, section 2.2). Whatever a unit needs was then computed in the
tick before by the neighbour, and nothing ever queues. So ``m`` microbatches take ``m v + p - 1`` forward and as many
backward slots, of which ``p - 1`` are idle on each stage: GPipe and 1F1B differ in memory alone.
"""

import dataclasses
import functools
from typing import Literal, NamedTuple

import numpy as np

from ml.errors import UserError

Kind = Literal["gpipe", "1f1b"]


class Units(NamedTuple):
    """What each stage does in each tick: arrays ``[ticks, stages]``.

    Attributes:
      active: whether it does anything; an idle stage's other entries are harmless.
      chunk: which of its runs of layers.
      microbatch: which microbatch.
      slot: where the stage keeps the input of this unit from its forward to its backward pass. An idle stage has the
        spare slot, ``Schedule.slots``.
    """

    active: np.ndarray
    chunk: np.ndarray
    microbatch: np.ndarray
    slot: np.ndarray


class Events(NamedTuple):
    """What happens to the pipeline as a whole in each tick: arrays ``[ticks]``.

    Attributes:
      active: whether it happens.
      microbatch: to which microbatch.
      slot: where the gradient of its last hidden state is kept (`Schedule.head_slots`).
    """

    active: np.ndarray
    microbatch: np.ndarray
    slot: np.ndarray


class Phase(NamedTuple):
    """Ticks ``start .. stop - 1``, alike in what they may compute."""

    start: int
    stop: int
    forward: bool
    backward: bool


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The schedule of one step.

    With several chunks, microbatches go round in groups of ``stages``; a last group that is not full leaves its places
    idle (`check_pipeline` refuses that for training, where it costs time at every step).

    Attributes:
      stages: devices (or groups of them) along the pipeline.
      microbatches: parts of the batch.
      chunks: runs of layers on each stage.
      kind: when backward passes begin; ``None``: never (evaluation).
    """

    stages: int
    microbatches: int
    chunks: int = 1
    kind: Kind | None = "1f1b"

    @property
    def forward_slots(self) -> int:
        """Ticks with forward units: the time of the forward pass, in units; the backward pass takes as many."""
        groups = -(-self.microbatches // self.stages)
        places = self.microbatches if self.chunks == 1 else groups * self.stages
        return places * self.chunks + self.stages - 1

    @property
    def first_backward(self) -> int:
        """The tick of the first backward unit."""
        return self.chunks * self.stages - 1 if self.kind == "1f1b" else self.forward_slots

    @property
    def bubble(self) -> float:
        """The share of a stage's time that it idles."""
        return 1 - self.microbatches * self.chunks / self.forward_slots

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Forward only, both, backward only; empty ones are left out."""
        forward_stop = self.forward_slots
        if self.kind is None:
            return (Phase(0, forward_stop, True, False),)
        start, stop = self.first_backward, self.first_backward + self.forward_slots
        phases = (
            Phase(0, start, True, False),
            Phase(start, forward_stop, True, True),
            Phase(forward_stop, stop, False, True),
        )
        return tuple(phase for phase in phases if phase.start < phase.stop)

    @property
    def ticks(self) -> int:
        """Ticks of the whole step."""
        return self.phases[-1].stop

    @property
    def slots(self) -> int:
        """Inputs that a stage must be able to keep: at most ``2 v p - 1`` with 1F1B, ``m v`` with GPipe."""
        return self._kept[0]

    @property
    def head_slots(self) -> int:
        """Gradients of last hidden states that must be kept: 1 with 1F1B, all with GPipe."""
        return self._head_kept[0]

    @functools.cached_property
    def forward(self) -> Units:
        """The forward units."""
        tick, stage = np.indices((self.ticks, self.stages))
        active, chunk, microbatch = self._unit(tick - stage, backward=False)
        return Units(active, chunk, microbatch, np.where(active, self._kept[1][stage, microbatch, chunk], self.slots))

    @functools.cached_property
    def backward(self) -> Units:
        """The backward units."""
        tick, stage = np.indices((self.ticks, self.stages))
        number = tick - self.first_backward - (self.stages - 1 - stage)
        active, chunk, microbatch = self._unit(number, backward=True)
        if self.kind is None:
            active = np.zeros_like(active)
        return Units(active, chunk, microbatch, np.where(active, self._kept[1][stage, microbatch, chunk], self.slots))

    @property
    def entering(self) -> Events:
        """A microbatch is embedded, for the first stage to take in."""
        return self._events(self.forward, stage=0, chunk=0)

    @property
    def leaving(self) -> Events:
        """A microbatch has passed the last layer: its loss is due."""
        return self._events(self.forward, stage=self.stages - 1, chunk=self.chunks - 1)

    @property
    def turning(self) -> Events:
        """A microbatch begins its way back, at the last layer."""
        return self._events(self.backward, stage=self.stages - 1, chunk=self.chunks - 1)

    @property
    def returning(self) -> Events:
        """A microbatch has come back through the first layer: the gradient of its embedding is due."""
        return self._events(self.backward, stage=0, chunk=0)

    def _unit(self, number: np.ndarray, backward: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Whether units of these numbers exist, and their chunk and microbatch."""
        group, rest = np.divmod(number, self.stages * self.chunks)
        chunk, place = np.divmod(rest, self.stages)
        microbatch = group * self.stages + place
        active = (number >= 0) & (number < self.forward_slots - (self.stages - 1)) & (microbatch < self.microbatches)
        chunk = self.chunks - 1 - chunk if backward else chunk
        return active, np.where(active, chunk, 0), np.where(active, microbatch, 0)

    def _events(self, units: Units, stage: int, chunk: int) -> Events:
        active = units.active[:, stage] & (units.chunk[:, stage] == chunk)
        microbatch = np.where(active, units.microbatch[:, stage], 0)
        return Events(active, microbatch, self._head_kept[1][microbatch])

    def _number(self, microbatch: np.ndarray, chunk: np.ndarray) -> np.ndarray:
        group, place = np.divmod(microbatch, self.stages)
        return (group * self.chunks + chunk) * self.stages + place

    @functools.cached_property
    def _kept(self) -> tuple[int, np.ndarray]:
        """How many slots hold all inputs, and each input's: ``[stages, microbatches, chunks]``."""
        shape = (self.stages, self.microbatches, self.chunks)
        if self.kind is None:
            return 0, np.zeros(shape, int)
        stage, microbatch, chunk = np.indices(shape)
        begin = self._number(microbatch, chunk) + stage
        mirrored = self._number(microbatch, self.chunks - 1 - chunk)
        end = self.first_backward + mirrored + (self.stages - 1 - stage)
        slots = [_share(b.ravel(), e.ravel()) for b, e in zip(begin, end, strict=True)]
        return max(count for count, _ in slots), np.stack([slot for _, slot in slots]).reshape(shape)

    @functools.cached_property
    def _head_kept(self) -> tuple[int, np.ndarray]:
        """How many slots hold the gradients of all last hidden states, and each microbatch's."""
        if self.kind is None:
            return 0, np.zeros(self.microbatches, int)
        microbatch = np.arange(self.microbatches)
        begin = self._number(microbatch, np.full_like(microbatch, self.chunks - 1)) + self.stages - 1
        return _share(begin, self.first_backward + self._number(microbatch, np.zeros_like(microbatch)))


def check_pipeline(*, num_layers: int, stages: int, chunks: int, microbatches: int) -> None:
    """Refuses a pipeline into which the model or the batch does not divide.

    Raises:
      UserError: names the fields, the numbers and valid choices.
    """
    runs = stages * chunks
    if num_layers % runs:
        choices = [f"{count}" for count in range(1, num_layers + 1) if num_layers % (count * chunks) == 0]
        mend = f"choose stage from {', '.join(choices)}" if choices else "lower pipeline_chunks"
        raise UserError(
            f"config.model.num_layers={num_layers} is not a multiple of config.mesh.stage={stages} x "
            f"config.train.pipeline_chunks={chunks}; {mend}"
        )
    if chunks > 1 and microbatches % stages:
        near = max(stages, microbatches // stages * stages)
        raise UserError(
            f"config.train.microbatches={microbatches} is not a multiple of config.mesh.stage={stages}, as "
            f"config.train.pipeline_chunks={chunks} needs; use {near} or {near + stages}, or pipeline_chunks=1"
        )


def _share(begin: np.ndarray, end: np.ndarray) -> tuple[int, np.ndarray]:
    """Gives each interval of ticks (both ends included) a slot to itself meanwhile; as few slots as possible."""
    slot = np.zeros(begin.shape, int)
    busy_until: list[int] = []
    for i in np.argsort(begin, kind="stable"):
        free = next((k for k, until in enumerate(busy_until) if until < begin[i]), len(busy_until))
        if free == len(busy_until):
            busy_until.append(0)
        busy_until[free], slot[i] = end[i], free
    return len(busy_until), slot
