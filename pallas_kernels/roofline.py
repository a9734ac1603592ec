"""The least time that a computation can take on a chip: the slower of its multiplications and its memory traffic."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Cost:
    """What has to be done, however it is done.

    Attributes:
      flops: of matrix products, a multiplication and an addition counted as two.
      bytes: that must cross device memory's bus: operands once, results once.
    """

    flops: float
    bytes: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The least time at these rates, multiplications and traffic going on at once."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)

    def bound(self, flops_per_second: float, bytes_per_second: float) -> str:
        """``compute`` or ``memory``."""
        return "compute" if self.flops / flops_per_second > self.bytes / bytes_per_second else "memory"
