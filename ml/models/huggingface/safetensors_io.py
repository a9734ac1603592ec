"""Reading and writing safetensors files a few rows at a time, so that no tensor need be in memory twice.

The format (https://huggingface.co/docs/safetensors): eight bytes of little-endian header length, a JSON header that
gives each tensor's dtype, shape and byte range, then the tensors end to end. Never pickle.
"""

import dataclasses
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from ml.errors import UserError
from ml.models.huggingface import transpose

CHUNK_BYTES = 16 << 20
_MAX_HEADER_BYTES = 100_000_000  # the reference implementation's own limit

FLOAT_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_CODES = {dtype: code for code, dtype in FLOAT_DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a file: its dtype code (``F32``, ``BF16``, ...), shape, and byte range in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """The header of a safetensors file, checked against its length; tensors are read on demand.

    Attributes:
      path: the file.
      entries: tensor name -> `Entry`.

    Raises:
      UserError: not a safetensors file, or cut short.
    """

    def __init__(self, path: Path):
        self.path = path
        self.entries: dict[str, Entry] = {}
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                prefix = file.read(8)
                length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
                if prefix == b"version ":
                    raise UserError(
                        f"{path}: a Git LFS pointer, not the weights themselves; run `git lfs pull` in its folder"
                    )
                if size < 8 or length > _MAX_HEADER_BYTES:
                    raise UserError(f"{path}: not a safetensors file; download it again")
                if size < 8 + length:
                    raise UserError(f"{path}: cut short within its header ({size} bytes); download it again")
                header = json.loads(file.read(length))
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            raise UserError(f"{path}: not a safetensors file (its header is not JSON); download it again") from error
        end = 8 + length
        try:
            for name, fields in header.items():
                if name == "__metadata__":
                    continue
                start, stop = (8 + length + int(offset) for offset in fields["data_offsets"])
                self.entries[name] = Entry(fields["dtype"], tuple(map(int, fields["shape"])), start, stop)
                end = max(end, stop)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: its safetensors header is malformed; download it again") from error
        if size < end:
            raise UserError(f"{path}: cut short: {size} bytes of {end}; download it again")

    def rows(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """Yields ``(first row, rows)`` of a tensor, about `CHUNK_BYTES` at a time; a vector or scalar is one row.

        Raises:
          UserError: the tensor is not stored as floating-point numbers of 16 bits or more, or its size is inconsistent.
        """
        entry = self.entries[name]
        if entry.dtype not in FLOAT_DTYPES:
            raise UserError(
                f"{self.path}: tensor {name} is stored as {entry.dtype}; only {', '.join(FLOAT_DTYPES)} are read, "
                "so save the checkpoint without quantization"
            )
        dtype = FLOAT_DTYPES[entry.dtype]
        if math.prod(entry.shape) * dtype.itemsize != entry.stop - entry.start:
            raise UserError(
                f"{self.path}: tensor {name}: byte range and shape {list(entry.shape)} disagree; download it again"
            )
        shape = entry.shape if len(entry.shape) > 1 else (1, math.prod(entry.shape))
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        step = max(1, CHUNK_BYTES // max(row_bytes, 1))
        with self.path.open("rb", buffering=0) as file:
            file.seek(entry.start)
            for first in range(0, shape[0], step):
                count = min(step, shape[0] - first)
                data = np.empty((count, *shape[1:]), dtype)
                _read_exactly(file, memoryview(data.reshape(-1).view(np.uint8)), self.path)
                yield first, data


@dataclasses.dataclass(frozen=True)
class Outgoing:
    """A tensor to be written; ``rows()`` gives consecutive pieces of it in C order, of any dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    rows: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write(path: Path, tensors: Sequence[Outgoing]) -> None:
    """Writes one safetensors file, piece by piece."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}  # transformers 4 refuses a file without a format
    offset = 0
    for tensor in tensors:
        stop = offset + tensor.nbytes
        entry = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, stop]}
        header[tensor.name] = entry
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start on an 8-byte boundary
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            written = 0
            for piece in tensor.rows():
                data = np.empty(piece.shape, tensor.dtype)
                transpose.copy(data, piece)
                file.write(memoryview(data.reshape(-1).view(np.uint8)))
                written += data.nbytes
            if written != tensor.nbytes:
                raise AssertionError(f"{tensor.name}: wrote {written} bytes of {tensor.nbytes}")


def storable_dtype(dtype: object) -> np.dtype:
    """The NumPy dtype for a dtype or its name, if checkpoints can hold it.

    Raises:
      UserError: not one of float64, float32, float16, bfloat16.
    """
    names = {str(known): known for known in FLOAT_DTYPES.values()}
    try:
        name = str(np.dtype(dtype))  # type: ignore[call-overload]
    except TypeError:
        name = str(dtype)
    if name not in names:
        raise UserError(f"dtype {name}: weights are stored as one of {', '.join(sorted(names))}")
    return names[name]


def _read_exactly(file, buffer: memoryview, path: Path) -> None:
    """Fills ``buffer``: one raw read may return less than asked (Linux stops at 2 GiB)."""
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])
        if not count:
            raise UserError(f"{path}: cut short while being read; download it again")
        done += count
