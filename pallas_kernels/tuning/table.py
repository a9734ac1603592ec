"""A tuning table's file: one JSON document per kernel, read strictly."""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

Size = int | str | bool

# Sizes on which a kernel's layout depends: an entry for another one says nothing.
EXACT = ("head_dim", "page_size")
# How far below the size asked for an entry may lie, in powers of two.
_REACH = 2


class TableError(ValueError):
    """A table is malformed."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One measured choice.

    Attributes:
      op: the kernel.
      chip: device kind that it was measured on.
      dtype: of the operands.
      shape: sizes and words that it holds for; what is not named does not matter.
      config: fields of the kernel's configuration.
      seconds: what it took; ``None``: not measured (a candidate).
      versions: of ``jax`` and others that it was measured with.
      where: the file and the entry's number, for messages.
    """

    op: str
    chip: str
    dtype: str
    shape: Mapping[str, Size]
    config: Mapping[str, Any]
    seconds: float | None = None
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    where: str = dataclasses.field(default="an overlay", compare=False)

    @property
    def key(self) -> tuple:
        """What an entry replaces another by: all but the choice itself."""
        return self.op, self.chip, self.dtype, tuple(sorted(bucketed(self.shape).items())), self.versions.get("jax")


def bucketed(shape: Mapping[str, Size]) -> dict[str, Size]:
    """Sizes rounded down to powers of two, but for the `EXACT` ones and for words."""
    return {name: size if _is_exact(name, size) else 1 << _log2(size) for name, size in shape.items()}


def distance(entry: Mapping[str, Size], asked: Mapping[str, Size]) -> int | None:
    """Powers of two by which an entry's sizes lie below those asked for, summed; ``None``: it does not fit."""
    total = 0
    for name, size in entry.items():
        if name not in asked:
            return None
        if _is_exact(name, size) or _is_exact(name, asked[name]):
            if type(size) is not type(asked[name]) or size != asked[name]:
                return None
            continue
        steps = _log2(asked[name]) - _log2(size)
        if not 0 <= steps <= _REACH:
            return None
        total += steps
    return total


def _is_exact(name: str, size: Size) -> bool:
    return name in EXACT or not isinstance(size, int) or isinstance(size, bool)


def _log2(size: Any) -> int:
    return max(1, size).bit_length() - 1


def read(path: pathlib.Path) -> tuple[Entry, ...]:
    """Reads a table.

    Raises:
      TableError: it is malformed; names the file and the entry.
      OSError: it cannot be read.
    """
    try:
        document = json.loads(path.read_text())
    except ValueError as error:
        raise TableError(f"{path}: not JSON: {error}") from error
    if not isinstance(document, dict) or set(document) != {"op", "entries"}:
        raise TableError(f"{path}: must be an object with the keys 'op' and 'entries'")
    op, entries = document["op"], document["entries"]
    if not isinstance(op, str) or not isinstance(entries, list):
        raise TableError(f"{path}: 'op' must be a string and 'entries' a list")
    parsed: list[Entry] = []
    seen: dict[tuple, int] = {}
    for number, raw in enumerate(entries):
        entry = _parse(raw, op, f"{path}: entry {number}")
        if entry.key in seen:
            other = seen[entry.key]
            raise TableError(f"{entry.where}: the same chip, dtype, shape and version of jax as entry {other}")
        seen[entry.key] = number
        parsed.append(entry)
    return tuple(parsed)


_FIELDS: dict[str, type] = {"chip": str, "dtype": str, "shape": dict, "config": dict, "versions": dict}


def _parse(raw: Any, op: str, where: str) -> Entry:
    if not isinstance(raw, dict) or set(raw) != {*_FIELDS, "seconds"}:
        raise TableError(f"{where}: must be an object with the keys {', '.join(sorted({*_FIELDS, 'seconds'}))}")
    for name, kind in _FIELDS.items():
        if not isinstance(raw[name], kind):
            raise TableError(f"{where}: {name} must be {'a string' if kind is str else 'an object'}, not {raw[name]!r}")
    for name, size in raw["shape"].items():
        if not isinstance(size, int | str) or (isinstance(size, int) and size < 0):
            raise TableError(f"{where}: shape.{name} must be a size or a word, not {size!r}")
    seconds = raw["seconds"]
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not seconds > 0:
        raise TableError(f"{where}: seconds must be a positive number, not {seconds!r}")
    if not isinstance(raw["versions"].get("jax"), str):
        raise TableError(f"{where}: versions must name that of jax")
    return Entry(op, where=where, **raw)


def merged(old: Iterable[Entry], new: Iterable[Entry]) -> tuple[Entry, ...]:
    """Both, a new entry in place of an old one for the same chip, type, bucket of shapes and version of JAX."""
    return tuple({entry.key: entry for entry in (*old, *new)}.values())


def _order(entry: Entry) -> tuple:
    sizes = [(n, 0 if _is_exact(n, s) else s, str(s)) for n, s in sorted(bucketed(entry.shape).items())]
    return entry.chip, entry.dtype, sizes, entry.versions.get("jax", "")


def write(path: pathlib.Path, op: str, entries: Iterable[Entry]) -> None:
    """Writes a table, shapes as their buckets, in an order that keeps differences small."""
    rows = []
    for entry in sorted(entries, key=_order):
        if entry.op != op:
            raise ValueError(f"an entry of {entry.op} in the table of {op}")
        rows.append(
            {
                "chip": entry.chip,
                "dtype": entry.dtype,
                "shape": bucketed(entry.shape),
                "config": dict(entry.config),
                "seconds": entry.seconds,
                "versions": dict(entry.versions),
            }
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".tmp")
    whole.write_text(json.dumps({"op": op, "entries": rows}, indent=1) + "\n")
    whole.replace(path)
