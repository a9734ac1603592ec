"""Prepared pairs on disk: tokenized captions, and where each image lies."""

import io
import json
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from jaxtyping import Int
from PIL import Image

from ml.data.flat_files import FlatFiles, map_file, token_dtype
from ml.data.image_text.sources import Pair


class PairWriter:
    """Appends pairs: ids to ``tokens.bin``, where captions end to ``captions.bin``, where images lie to two files."""

    def __init__(self, directory: Path, vocab_size: int):
        self._files = FlatFiles(directory, ("tokens", "captions", "records", "paths", "images"))
        self._dtype = token_dtype(vocab_size)
        self._tokens = self._captions = self._paths = self._records = 0
        self._files.append("captions", np.zeros(1, np.int64))
        self._files.append("records", np.zeros(1, np.int64))

    def add(self, pair: Pair, captions: list[list[int]]) -> None:
        """Adds a pair and the ids of its captions."""
        for ids in captions:
            self._tokens += len(ids)
            self._files.append("tokens", np.asarray(ids, self._dtype))
            self._files.append("captions", np.array([self._tokens], np.int64))
        self._captions += len(captions)
        self._files.append("records", np.array([self._captions], np.int64))
        path = np.frombuffer(pair.path.encode(), np.uint8)
        self._files.append("paths", path)
        self._files.append("images", np.array([self._paths, len(path), pair.offset, pair.size], np.int64))
        self._paths += len(path)
        self._records += 1

    def finish(self) -> dict[str, Any]:
        """Closes the files, writes ``pairs.json`` and returns it."""
        return self._files.finish(
            "pairs", token_dtype=self._dtype.name, pairs=self._records, captions=self._captions, tokens=self._tokens
        )

    def close(self) -> None:
        """Closes the files; they are whole only after `finish`."""
        self._files.close()


class PairStore:
    """Random access to what a `PairWriter` wrote. Pickles as its path.

    Attributes:
      digest: a hash of the content.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        description = json.loads((directory / "pairs.json").read_text())
        self.digest: str = description["digest"]
        self._tokens = map_file(directory, "tokens", description["token_dtype"])
        self._ends = map_file(directory, "captions", "int64")
        self._records = map_file(directory, "records", "int64")
        self._paths = map_file(directory, "paths", "uint8")
        self._images = map_file(directory, "images", "int64").reshape(-1, 4)

    def __reduce__(self):
        return PairStore, (self._directory,)

    def __len__(self) -> int:
        return len(self._images)

    def captions(self, row: int) -> list[Int[np.ndarray, "tokens"]]:
        """Ids of each of a pair's captions."""
        first, last = self._records[row : row + 2].tolist()
        return [self._tokens[self._ends[i] : self._ends[i + 1]] for i in range(first, last)]

    def name(self, row: int) -> str:
        """Where an image lies."""
        start, length, offset, _ = self._images[row].tolist()
        path = bytes(self._paths[start : start + length]).decode()
        return f"{path} at byte {offset}" if offset else path

    def read(self, row: int) -> tuple[Image.Image, int]:
        """An image, decoded no further than its header, and ``row``; raises whatever a broken one raises."""
        start, length, offset, size = self._images[row].tolist()
        path = bytes(self._paths[start : start + length]).decode()
        # What was made while preparing lies beside the two sides.
        with fsspec.open(path if "://" in path else str(self._directory.parent / path), "rb") as file:
            file.seek(offset)
            return Image.open(io.BytesIO(file.read(size))), row
