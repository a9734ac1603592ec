"""What XLA says when a program does not fit the device's memory, as numbers."""

import dataclasses
import re

_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)\s*([KMGT]?)i?B?"
# The TPU compiler, when buffers were laid out and when it gave up before; a GPU's allocator.
_USED = re.compile(rf"[Uu]sed {_SIZE} of {_SIZE} hbm", re.DOTALL)
_TEMPORARIES = re.compile(rf"HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)")
_ALLOCATING = re.compile(rf"(?:trying to allocate|Attempting to (?:reserve|allocate)) {_SIZE}", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A program that does not fit.

    Attributes:
      needed_bytes: by the program, or by its temporaries alone.
      available_bytes: of the device, if the message says.
      temporaries_only: whether the arguments come on top.
    """

    needed_bytes: float | None
    available_bytes: float | None
    temporaries_only: bool


def read_refusal(message: str) -> Refusal | None:
    """Reads a compiler's error; ``None``: it is another one."""
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return None
    if found := _USED.search(message):
        return Refusal(_bytes(*found.groups()[:2]), _bytes(*found.groups()[2:]), False)
    if found := _TEMPORARIES.search(message):
        return Refusal(_bytes(*found.groups()[:2]), _bytes(*found.groups()[2:]), True)
    found = _ALLOCATING.search(message)
    return Refusal(_bytes(*found.groups()) if found else None, None, True)


def _bytes(number: str, unit: str) -> float:
    return float(number) * _UNITS[unit]
