"""``metrics.jsonl``: one row a step, each step once, whatever interrupted the run."""

import contextlib
import errno
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from ml.errors import UserError

# A float32 has about 7 significant decimal digits; more would be noise. Of lists, a value for each layer, fewer do.
_DIGITS, _DIGITS_IN_LISTS = 7, 4


class MetricsFile:
    """Appends one JSON object a step to a file.

    A row is written and flushed whole, so that a killed process loses at most the row it was writing.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume_step: int = 0):
        """Opens ``path``, dropping what a run resumed at ``resume_step`` is going to write again.

        Args:
          path: created if missing.
          resume_step: rows with a greater ``step``, and a last line cut short, are removed (atomically). 0: all rows.

        Raises:
          UserError: the disk is full, or the file cannot be written.
        """
        self.path = pathlib.Path(path)
        try:
            _truncate(self.path, resume_step)
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise _write_error(self.path, error) from error

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends the row ``{"step": step, **metrics}``.

        Args:
          step: number of the step that was just done, counted from 1.
          metrics: numbers (Python, NumPy or fetched JAX scalars), strings, or lists of numbers, which keep 4 digits;
            ``None`` values are left out. NaN and infinities are written as the strings ``"nan"``, ``"inf"`` and
            ``"-inf"``, since JSON has no such numbers.

        Raises:
          UserError: the disk is full, or the file cannot be written.
        """
        row = {"step": int(step)} | {key: _plain(value) for key, value in metrics.items() if value is not None}
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        start = os.fstat(self._file.fileno()).st_size
        try:
            written = self._file.write(line)
            while written < len(line):  # a nearly full disk takes a part, and refuses the rest
                written += self._file.write(line[written:])
        except OSError as error:
            with contextlib.suppress(OSError):  # else the half line is dropped on the next start
                os.ftruncate(self._file.fileno(), start)
            raise _write_error(self.path, error) from error

    def close(self) -> None:
        """Makes sure that all rows are on the disk, and closes."""
        if self._file.closed:
            return
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            if error.errno != errno.EINVAL:  # a pipe or /dev/null
                raise _write_error(self.path, error) from error
        finally:
            self._file.close()

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads all rows; a last line that was cut short is left out, and ``"nan"``, ``"inf"`` become floats again.

    Raises:
      UserError: no such file, or a broken line that is not the last.
    """
    try:
        data = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    return [row for row, _ in _rows(data, path)]


def _rows(data: bytes, path: str | os.PathLike[str]) -> list[tuple[dict[str, Any], bytes]]:
    """Rows and the bytes of their lines."""
    rows = []
    *lines, rest = data.split(b"\n")  # whatever follows the last newline was cut short
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError
        except ValueError:
            # After a crash of the machine, the end of the file may hold zeros instead of the row.
            if number == len(lines) and not rest:
                break
            raise UserError(f'{path}:{number}: not a row of metrics ({{"step": ...}}); remove this line') from None
        rows.append(({key: _number(value) for key, value in row.items()}, line + b"\n"))
    return rows


def _truncate(path: pathlib.Path, step: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        return
    data = path.read_bytes()
    kept = b"".join(line for row, line in _rows(data, path) if row["step"] <= step)
    if kept == data:
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _plain(value: Any, digits: int = _DIGITS) -> Any:
    if isinstance(value, list):
        return [_plain(one, _DIGITS_IN_LISTS) for one in value]
    if hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, float):
        return value
    return float(f"{value:.{digits}g}") if math.isfinite(value) else str(value)


def _number(value: Any) -> Any:
    if isinstance(value, list):
        return [_number(one) for one in value]
    return float(value) if value in ("nan", "inf", "-inf") else value


def _write_error(path: pathlib.Path, error: OSError) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"{path}: the disk is full; free some space and start again, the run resumes by itself")
    return UserError(f"{path}: cannot be written: {error.strerror}")
