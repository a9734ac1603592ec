"""Packed rows on disk: written once, streaming; read at random through memory maps.

Three flat files. ``tokens.bin`` is the documents one after another, each ``BOS t1 .. tn EOS``, two bytes a token where
the vocabulary allows; ``chunks.bin`` says where each chunk starts in it and how many pairs it holds; ``rows.bin`` says
which chunks make up each row. Plain arrays rather than records: padding, targets, segments and positions follow from
the tables and cost no disk, a row is read without decoding anything, and all reading processes share one page cache.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from numpy.typing import ArrayLike

from ml.data.flat_files import FlatFiles, map_file, token_dtype
from ml.data.packing import pack_best_fit, split_pairs

Batch = dict[str, np.ndarray]

# Chunks that are fitted together at a time: enough for rows more than 99% full, few enough for memory and locality.
PACKING_WINDOW = 8192


class RowWriter:
    """Appends documents to the three files in ``directory``. Memory is bounded by one document and one window."""

    def __init__(self, directory: Path, *, sequence_length: int, bos_id: int, eos_id: int, vocab_size: int):
        self._files = FlatFiles(directory, ("tokens", "chunks", "rows"))
        self._length = sequence_length
        self._bos, self._eos = bos_id, eos_id
        self._dtype = token_dtype(vocab_size)
        self._window: list[tuple[int, int]] = []
        self._tokens = self._chunks = self._rows = 0
        self._counts = {"documents": 0, "bytes": 0, "targets": 0}
        self._files.append("rows", np.zeros(1, np.int64))

    def add(self, ids: ArrayLike, num_bytes: int) -> None:
        """Adds a document of these text tokens (without BOS and EOS), which stand for ``num_bytes`` of UTF-8."""
        ids = np.asarray(ids)
        sequence = np.empty(len(ids) + 2, self._dtype)
        sequence[0], sequence[1:-1], sequence[-1] = self._bos, ids, self._eos
        pairs = len(sequence) - 1
        for start, size in split_pairs(pairs, self._length).tolist():
            chunk = (self._tokens + start, size)
            if size == self._length:
                self._write_row([chunk])
            else:
                self._window.append(chunk)
        self._files.append("tokens", sequence)
        self._tokens += len(sequence)
        for name, amount in (("documents", 1), ("bytes", num_bytes), ("targets", pairs)):
            self._counts[name] += amount
        if len(self._window) >= PACKING_WINDOW:
            self._pack_window()

    def finish(self) -> dict[str, Any]:
        """Packs what is left, closes the files, writes ``rows.json`` and returns it."""
        self._pack_window()
        return self._files.finish(
            "rows",
            sequence_length=self._length,
            token_dtype=self._dtype.name,
            tokens=self._tokens,
            chunks=self._chunks,
            rows=self._rows,
            **self._counts,
        )

    def close(self) -> None:
        """Closes the files; the rows are whole only after `finish`."""
        self._files.close()

    def _pack_window(self) -> None:
        lengths = np.array([size for _, size in self._window], np.int64)
        for row in pack_best_fit(lengths, self._length):
            self._write_row([self._window[index] for index in row])
        self._window = []

    def _write_row(self, chunks: list[tuple[int, int]]) -> None:
        self._files.append("chunks", np.array(chunks, np.int64))
        self._chunks += len(chunks)
        self._rows += 1
        self._files.append("rows", np.array([self._chunks], np.int64))


class PackedRows:
    """Random access to the rows that a `RowWriter` wrote. Pickles as its path, so worker processes map the same files.

    Attributes:
      sequence_length: ``L``.
      documents, bytes, targets: documents, their UTF-8 bytes, and their (input, target) pairs, in all.
      digest: a hash of the content.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        description = json.loads((directory / "rows.json").read_text())
        self._rows: int = description["rows"]
        self.sequence_length: int = description["sequence_length"]
        self.documents: int = description["documents"]
        self.bytes: int = description["bytes"]
        self.targets: int = description["targets"]
        self.digest: str = description["digest"]
        self._tokens = map_file(directory, "tokens", description["token_dtype"])
        self._chunks = map_file(directory, "chunks", "int64").reshape(-1, 2)
        self._offsets = map_file(directory, "rows", "int64")

    def __reduce__(self):
        return PackedRows, (self._directory,)

    def __len__(self) -> int:
        return self._rows

    def write_row(self, row: int, batch: Batch, place: int) -> None:
        """Fills row ``place`` of ``batch`` (as `empty_batch` makes it) with packed row ``row``."""
        column = 0
        chunks = self._chunks[self._offsets[row] : self._offsets[row + 1]].tolist()
        for segment, (start, size) in enumerate(chunks, 1):
            span = slice(column, column + size)
            batch["tokens"][place, span] = self._tokens[start : start + size]
            batch["targets"][place, span] = self._tokens[start + 1 : start + size + 1]
            batch["segment_ids"][place, span] = segment
            batch["positions"][place, span] = np.arange(size)
            column += size
        batch["loss_mask"][place, :column] = 1.0


def empty_batch(rows: int, length: int) -> Batch:
    """A batch of padding: every array ``[rows, length]`` and zero; ``loss_mask`` float32, the others int32."""
    batch: Batch = {
        name: np.zeros((rows, length), np.int32) for name in ("tokens", "targets", "segment_ids", "positions")
    }
    batch["loss_mask"] = np.zeros((rows, length), np.float32)
    return batch


def gather(stores: Sequence[PackedRows], rows: Int64[np.ndarray, "batch"]) -> Batch:
    """Reads rows into a batch.

    Args:
      stores: packed rows of one length; together they are one long list of rows.
      rows: indices into that list; beyond its end they give rows of padding.

    Returns:
      ``tokens``, ``targets``, ``segment_ids``, ``positions`` int32 and ``loss_mask`` float32, each ``[batch, L]``.
      ``targets[i]`` is the token after ``tokens[i]`` in the same document; segments count 1, 2, ... along a row, 0 is
      padding; positions restart in each segment; the mask is 1 on every segment and 0 on padding.
    """
    ends = np.cumsum([len(store) for store in stores])
    batch = empty_batch(len(rows), stores[0].sequence_length)
    owners = np.searchsorted(ends, rows, side="right")
    for place, (row, owner) in enumerate(zip(rows.tolist(), owners.tolist(), strict=True)):
        if owner < len(stores):
            first = int(ends[owner]) - len(stores[owner])
            stores[owner].write_row(row - first, batch, place)
    return batch
