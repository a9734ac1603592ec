"""Flat arrays on disk: appended to while a hash of them grows, and read back as maps of the files."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np


class FlatFiles:
    """Files of little-endian numbers in a new directory, one for each name."""

    def __init__(self, directory: Path, names: tuple[str, ...]):
        directory.mkdir(parents=True)
        self.directory = directory
        self._files = {name: open(directory / f"{name}.bin", "wb") for name in names}  # noqa: SIM115
        self._digest = hashlib.blake2b(digest_size=16)

    def append(self, name: str, array: np.ndarray) -> None:
        """Writes an array behind what file ``name`` holds."""
        data = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
        self._digest.update(name.encode())
        self._digest.update(data)
        self._files[name].write(data)

    def finish(self, description: str, **fields: Any) -> dict[str, Any]:
        """Closes the files, writes ``fields`` and a ``digest`` of all content to ``description``.json, returns them."""
        self.close()
        fields["digest"] = self._digest.hexdigest()
        (self.directory / f"{description}.json").write_text(json.dumps(fields, indent=2))
        return fields

    def close(self) -> None:
        """Closes the files; they are whole only after `finish`."""
        for file in self._files.values():
            file.close()


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest type that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def map_file(directory: Path, name: str, dtype: str) -> np.ndarray:
    """The content of a file as an array over a memory map."""
    path = directory / f"{name}.bin"
    little_endian = np.dtype(dtype).newbyteorder("<")
    if not path.stat().st_size:
        return np.zeros(0, little_endian)
    # A plain ndarray over the map: slicing np.memmap itself costs several times as much.
    return np.asarray(np.memmap(path, little_endian, mode="r"))
