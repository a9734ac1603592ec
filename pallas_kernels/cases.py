"""Programs at real models' shapes, to be compiled for machines that need not be here (`scripts/kernel_schedule.py`).

A kernel's package lists its own in a module ``cases.py``: a function ``cases()`` that returns `Case`s. It is found by
its name; nothing else has to be told of it. For example, in ``pallas_kernels/flash_attention/cases.py``::

    def cases():
        query, key = bf16(1, 8192, 32, 128), bf16(1, 8192, 8, 128)   # jax.ShapeDtypeStruct
        yield Case("flash_attention/forward/llama3_8b", flash_attention, (query, key, key))

A case is compiled in another process (`pallas_kernels.absent.reports`), which finds it by its name. Its function is
traced with `pallas_kernels.platform` saying the target's platform and chip, so ``implementation="auto"`` is that chip's
kernel.
"""

import dataclasses
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import pallas_kernels


@dataclasses.dataclass(frozen=True)
class Case:
    """A program and the shapes to compile it for.

    Attributes:
      name: ``PACKAGE/WHAT/SHAPES``, its own in the whole tree.
      function: of arrays; a name that says nothing (a lambda) is fine.
      arguments: pytrees of `jax.ShapeDtypeStruct`.
      families: keys of `pallas_kernels.absent.TARGETS`: what it is compiled for.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    families: tuple[str, ...] = ("v5e", "v5p", "v6e", "h200")


def all_cases() -> Iterator[Case]:
    """Those of all packages.

    Raises:
      ValueError: two of one name.
    """
    seen = set()
    for module in pkgutil.iter_modules(pallas_kernels.__path__):
        if not module.ispkg or importlib.util.find_spec(f"pallas_kernels.{module.name}.cases") is None:
            continue
        for case in importlib.import_module(f"pallas_kernels.{module.name}.cases").cases():
            if case.name in seen:
                raise ValueError(f"two cases are named {case.name}")
            seen.add(case.name)
            yield case


def find(name: str) -> Case:
    """A case by its name, or by ``MODULE:ATTRIBUTE`` for one that is in no list.

    Raises:
      KeyError: there is none of that name.
    """
    if ":" in name:
        module, attribute = name.split(":")
        return getattr(importlib.import_module(module), attribute)
    for case in all_cases():
        if case.name == name:
            return case
    raise KeyError(f"no case {name!r} in the packages' cases.py")
