"""What benchmarks say of the machine they run on, and whether it is theirs alone."""

import time
from pathlib import Path

from ml.machine import cpu, device, versions

__all__ = ["busy_share", "cpu", "device", "refuse", "versions"]

# Above this share of the machine's time taken by others, nothing is measured.
_BUSY = 0.10


def refuse(busy: float) -> None:
    """Raises `ml.errors.UserError` if others take too large a share of the machine's time."""
    from ml.errors import UserError

    if busy > _BUSY:
        raise UserError(
            f"others take {busy:.0%} of this machine's time: stop them, or give --allow_load to measure anyway"
        )


def busy_share(seconds: float = 3.0) -> float:
    """The share of the machine's time that others take."""

    def times() -> tuple[int, int]:
        fields = [int(x) for x in stat.read_text().split("\n", 1)[0].split()[1:9]]
        return sum(fields) - fields[3] - fields[4], sum(fields)

    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    busy, total = times()
    time.sleep(seconds)
    return (times()[0] - busy) / max(1, times()[1] - total)
