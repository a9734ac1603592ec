"""Configurations that were measured to be best: ``pallas_kernels/tuning/OP.json``, looked up by chip, type and shape.

`scripts/tune_kernels.py` writes the tables. Where they have no entry, kernels go by their heuristics. An entry is found
at trace time, so a program that is compiled already keeps the configuration that it was compiled with.
"""

import contextlib
import contextvars
import functools
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from pallas_kernels.chips import ALIASES
from pallas_kernels.tuning.table import Entry, Size, TableError, bucketed, distance, merged, read, write

FOLDER = pathlib.Path(__file__).parent
_overlays: contextvars.ContextVar[tuple[tuple[Entry, ...], ...]] = contextvars.ContextVar("overlays", default=())
_Config = TypeVar("_Config")


def tuned(op: str, chip: str | None, dtype: Any, **shape: Size) -> dict[str, Any] | None:
    """The configuration to use, or ``None``: the tables know none.

    Args:
      op: the kernel's name, that of its table.
      chip: device kind, of `pallas_kernels.platform.chip`.
      dtype: of the operands.
      **shape: what the choice depends on: sizes by name, and words (a second type, a kind of mask). An entry fits if
        the words and the sizes in `pallas_kernels.tuning.table.EXACT` that it names are equal, and the other sizes that
        it names at most the ones asked for (in powers of two, rounded down) and not less than a quarter of them. The
        entry that names most is taken; of those the nearest; of those the one measured with this version of JAX.

    Raises:
      TableError: a table is malformed; names the file and the entry.
    """
    entry = _find(op, chip, dtype, shape)
    return None if entry is None else dict(entry.config)


def tuned_config(kind: type[_Config], op: str, chip: str | None, dtype: Any, **shape: Size) -> _Config | None:
    """`tuned` as a ``kind``, a dataclass.

    Raises:
      TableError: also if the configuration is none of ``kind``.
    """
    entry = _find(op, chip, dtype, shape)
    if entry is None:
        return None
    try:
        return kind(**entry.config)
    except (TypeError, ValueError) as error:
        raise TableError(f"{entry.where}: config: {error}") from error


@contextlib.contextmanager
def overlay(table: str | os.PathLike[str] | Iterable[Entry]) -> Iterator[None]:
    """Entries that go before the shipped ones while the context lasts, in this thread.

    Args:
      table: a file such as `scripts/tune_kernels.py` writes, or entries, which need not be measured.

    Raises:
      TableError: the file is malformed.
      OSError: it cannot be read.
    """
    entries = read(pathlib.Path(table)) if isinstance(table, str | os.PathLike) else tuple(table)
    token = _overlays.set((entries, *_overlays.get()))
    try:
        yield
    finally:
        _overlays.reset(token)


def _find(op: str, chip: str | None, dtype: Any, shape: dict[str, Size]) -> Entry | None:
    if chip is None:
        return None
    chip, dtype = ALIASES.get(chip, chip), jnp.dtype(dtype).name
    for entries in (*_overlays.get(), shipped(op)):
        fitting = []
        for entry in entries:
            if (entry.op, ALIASES.get(entry.chip, entry.chip), entry.dtype) != (op, chip, dtype):
                continue
            steps = distance(entry.shape, shape)
            if steps is not None:
                same = entry.versions.get("jax") == jax.__version__
                fitting.append(((len(entry.shape), -steps, same), entry))
        if fitting:
            return max(fitting, key=lambda pair: pair[0])[1]
    return None


@functools.cache
def shipped(op: str) -> tuple[Entry, ...]:
    """The entries of ``op`` that come with the package."""
    path = FOLDER / f"{op}.json"
    return read(path) if path.exists() else ()


__all__ = [
    "FOLDER",
    "Entry",
    "Size",
    "TableError",
    "bucketed",
    "merged",
    "overlay",
    "read",
    "shipped",
    "tuned",
    "tuned_config",
    "write",
]
