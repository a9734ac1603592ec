"""One case of a benchmark: shapes, the least that it costs, and the programs that compute it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from kernel_bench.timing import Program
from pallas_kernels.roofline import Cost


@dataclasses.dataclass(frozen=True)
class Built:
    """A case's programs on the device.

    Attributes:
      programs: ours and peers.
      outputs: for programs whose result is to be compared: how to bring it into the first one's form.
      failed: peers that could not be set up, and why.
    """

    programs: list[Program]
    outputs: Mapping[str, Callable[[Any], Any]] = dataclasses.field(default_factory=dict)
    failed: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class BenchCase:
    """A case.

    Attributes:
      name: its own within the kernel.
      settings: what is measured, for the report.
      cost: the least that must be done.
      dtype: of the products, for the data sheet's rate.
      build: makes the programs; given whether peers are wanted.
      parts: costs whose bounds are summed instead, where one part must end before the next begins.
    """

    name: str
    settings: Mapping[str, Any]
    cost: Cost
    dtype: str
    build: Callable[[bool], Built]
    parts: tuple[Cost, ...] = ()

    def bound(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The least seconds at these rates."""
        parts = self.parts or (self.cost,)
        return sum(part.seconds(flops_per_second, bytes_per_second) for part in parts)


Peers = Mapping[str, Callable[[], Program | None]]


def add_peers(programs: list[Program], failed: dict[str, str], peers: Peers) -> None:
    """Sets up peers, noting why one cannot be; one that gives ``None`` does not apply and is left out."""
    for name, make in peers.items():
        try:
            program = make()
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            continue
        if program is not None:
            programs.append(program)


def rotations(bytes_per_set: float, cache_bytes: float, most: int = 16) -> int:
    """How many sets of arguments it takes that none is still in the chip's cache when its turn comes again."""
    return max(1, min(most, 1 + int(2 * cache_bytes // max(1.0, bytes_per_set))))
