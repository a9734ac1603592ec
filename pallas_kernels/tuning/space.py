"""What can be tuned: for each kernel, shapes at which it matters and configurations to try (`scripts/tune_kernels.py`).

A kernel's package lists its own in a module ``tune.py``: a function ``spaces(platform)`` that returns `Space`s. For
example, in ``pallas_kernels/flash_attention/tune.py``::

    def spaces(platform):
        if platform == "gpu":
            for length in (2048, 8192):
                shape = {"length": length, "heads": 32, "kv_heads": 8, "head_dim": 128}
                yield Space("flash_attention", "bfloat16", shape, candidates, make)

where ``shape`` has the names and sizes that the kernel gives to `pallas_kernels.tuning.tuned`.
"""

import dataclasses
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pallas_kernels
from pallas_kernels.tuning.table import Size


@dataclasses.dataclass(frozen=True)
class Space:
    """One shape at which a kernel is to be tuned.

    Attributes:
      op: as given to `pallas_kernels.tuning.tuned`.
      dtype: likewise.
      shape: likewise.
      candidates: configurations to try, the heuristic's own among them, as what JSON can hold.
      make: makes, for a configuration, a pure function and sets of arguments to call it with in turn (together larger
        than the chip's cache). Called in a process of its own; may raise, as may the function: that costs the
        candidate.
    """

    op: str
    dtype: str
    shape: Mapping[str, Size]
    candidates: Sequence[Mapping[str, Any]]
    make: Callable[[Mapping[str, Any]], tuple[Callable[..., Any], Sequence[tuple]]]


def all_spaces(platform: str) -> Iterator[Space]:
    """Those of all packages for ``gpu``, ``tpu`` or ``cpu``."""
    for module in pkgutil.iter_modules(pallas_kernels.__path__):
        name = f"pallas_kernels.{module.name}.tune"
        if module.ispkg and importlib.util.find_spec(name) is not None:
            yield from importlib.import_module(name).spaces(platform)
