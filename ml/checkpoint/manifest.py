"""The manifest of a checkpoint: what it holds, file by file, and the mark that it is whole.

Orbax makes a save atomic, but it keeps no checksum of the array data, so a flipped bit or a truncated file can go
unnoticed. After Orbax is done, each process lists the files that it wrote with their sizes and CRC-32, and puts that
list beside them by an atomic rename. A checkpoint is whole when the manifests of all its processes are there and agree
with the files.

Cost: each process reads once more what it wrote, in the background and mostly from the page cache;
a verified restore reads everything twice.
"""

import concurrent.futures
import dataclasses
import json
import os
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

FORMAT = 1
_CHUNK = 4 << 20
_READERS = 8


class NotWhole(Exception):
    """Why a checkpoint cannot be trusted."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """One process's part of a checkpoint.

    Attributes:
      step: number of finished steps.
      processes: how many processes saved; each left a manifest.
      files: path relative to the checkpoint -> (bytes, CRC-32).
      leaves: name -> (shape, dtype); only process 0's manifest lists them.
      data_state: where the data stream stood; only in process 0's manifest.
    """

    step: int
    processes: int
    files: Mapping[str, tuple[int, int]]
    leaves: Mapping[str, tuple[tuple[int, ...], str]] = dataclasses.field(default_factory=dict)
    data_state: Any = None


def path_of(checkpoint: epath.Path, process: int) -> epath.Path:
    """Where a process's part of the manifest lies."""
    return checkpoint / ("manifest.json" if process == 0 else f"manifest.{process}.json")


def is_local(path: epath.Path) -> bool:
    """Whether a path is in a file system, and no URL."""
    return "://" not in str(path)


def checksum(path: epath.Path, sync: bool = False) -> tuple[int, int]:
    """Returns (bytes, CRC-32) of a file, read in chunks; ``sync`` also forces a local file's content to the disk."""
    size, crc = 0, 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            size += len(chunk)
            crc = zlib.crc32(chunk, crc)
        if sync and is_local(path):
            os.fsync(file.fileno())
    return size, crc


def list_files(checkpoint: epath.Path, process: int, processes: int) -> dict[str, tuple[int, int]]:
    """Checksums of the files that ``process`` answers for: its own data, and for process 0 all that is nobody's."""
    names = []
    for name in _walk(checkpoint):
        owner = _writer(name)
        if (owner if owner is not None and owner < processes else 0) == process:
            names.append(name)
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        return dict(zip(names, pool.map(lambda name: checksum(checkpoint / name, sync=True), names), strict=True))


def write(checkpoint: epath.Path, process: int, manifest: Manifest) -> None:
    """Puts the manifest in place. Until the rename has happened the checkpoint is not whole."""
    content = {"format": FORMAT, **dataclasses.asdict(manifest)}
    content["checksum"] = _self_checksum(content)
    final = path_of(checkpoint, process)
    partial = final.with_name(final.name + ".partial")
    with partial.open("w") as file:
        file.write(json.dumps(content))
        file.flush()
        if is_local(partial):
            os.fsync(file.fileno())
    partial.replace(final)
    if is_local(final):
        for directory in (checkpoint, checkpoint.parent):
            descriptor = os.open(directory, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def read(checkpoint: epath.Path, process: int = 0) -> Manifest:
    """Reads one manifest.

    Raises:
      NotWhole: it is missing or damaged.
    """
    path = path_of(checkpoint, process)
    try:
        content = json.loads(path.read_text())
        expected = content.pop("checksum")
        if _self_checksum(content) != expected:
            raise NotWhole(f"{path.name} is damaged")
        if content.pop("format") != FORMAT:
            raise NotWhole(f"{path.name} has a format that this version does not know")
        content["files"] = {name: (size, crc) for name, (size, crc) in content["files"].items()}
        content["leaves"] = {name: (tuple(shape), dtype) for name, (shape, dtype) in content["leaves"].items()}
        return Manifest(**content)
    except FileNotFoundError:
        raise NotWhole(f"{path.name} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise NotWhole(f"{path.name} is damaged") from None


def verify(checkpoint: epath.Path, processes: Iterable[int], content: bool = True) -> None:
    """Compares the files that ``processes`` wrote with their manifests; ``content=False`` looks at sizes only.

    Raises:
      NotWhole: naming the first file that is missing or differs.
    """
    files: dict[str, tuple[int, int]] = {}
    for process in processes:
        files.update(read(checkpoint, process).files)

    def problem(name: str) -> str | None:
        path = checkpoint / name
        size, crc = files[name]
        try:
            found = path.stat().length
            if found != size:
                return f"{name} has {found} bytes instead of {size}"
            if content and checksum(path)[1] != crc:
                return f"{name} is damaged (its checksum differs)"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        return None

    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        for found in pool.map(problem, files):
            if found:
                raise NotWhole(found)


def _self_checksum(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _walk(directory: epath.Path, prefix: str = "") -> list[str]:
    names: list[str] = []
    for entry in sorted(directory.iterdir()):
        if entry.is_dir():
            names += _walk(entry, f"{prefix}{entry.name}/")
        elif prefix or not entry.name.startswith("manifest."):
            names.append(prefix + entry.name)
    return names


def _writer(name: str) -> int | None:
    """The process that wrote a file, where Orbax's names tell: it gives each process a folder of its own for data."""
    for part in name.split("/"):
        for prefix in ("ocdbt.process_", "process_"):
            if part.startswith(prefix) and part[len(prefix) :].isdigit():
                return int(part[len(prefix) :])
    return None
