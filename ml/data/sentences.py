"""Documents as runs of sentences on disk: written once, streaming; read at random through memory maps.

Four flat files. ``tokens.bin`` is the text tokens of all sentences one after another; ``words.bin`` marks those that
begin a word; ``sentences.bin`` says where each sentence begins; ``spans.bin`` holds the records: runs of consecutive
sentences of one document that fill a row. What is done with a record, `ml.data.masking` draws anew in each epoch.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from ml.data.flat_files import FlatFiles, map_file, token_dtype

# Special tokens in a row: one before, one between, one behind the two sentences.
SPECIAL_TOKENS = 3


class SentenceWriter:
    """Appends documents to the four files in ``directory``. Memory is bounded by one document."""

    def __init__(self, directory: Path, *, sequence_length: int, vocab_size: int):
        self._files = FlatFiles(directory, ("tokens", "words", "sentences", "spans"))
        self._length = sequence_length
        self._room = sequence_length - SPECIAL_TOKENS
        self._dtype = token_dtype(vocab_size)
        self._tokens = self._sentences = self._spans = 0
        self._counts = {"documents": 0, "bytes": 0}
        self._files.append("sentences", np.zeros(1, np.int64))

    def add(self, sentences: Sequence[tuple[Sequence[int], Sequence[bool]]], num_bytes: int) -> None:
        """Adds a document.

        Args:
          sentences: ids of each, and which of them begin a word.
          num_bytes: of UTF-8 that they stand for.
        """
        # Halves of a row, so that a record of one sentence is left only where a document is that short.
        pieces = [
            (ids[start : start + self._room // 2], words[start : start + self._room // 2])
            for ids, words in sentences
            for start in range(0, len(ids), self._room // 2)
        ]
        if not pieces:
            return
        sizes = np.array([len(ids) for ids, _ in pieces], np.int64)
        ends = self._tokens + np.cumsum(sizes)
        first, last = self._sentences, self._sentences + len(pieces)
        spans = [(first + start, first + end, last) for start, end in spans_of(sizes, self._room)]
        self._files.append("tokens", np.concatenate([np.asarray(ids, self._dtype) for ids, _ in pieces]))
        begins = [np.asarray(words, np.uint8) for _, words in pieces]
        for piece in begins:
            piece[0] = 1
        self._files.append("words", np.concatenate(begins))
        self._files.append("sentences", ends)
        self._files.append("spans", np.array(spans, np.int64))
        self._tokens, self._sentences = int(ends[-1]), last
        self._spans += len(spans)
        self._counts["documents"] += 1
        self._counts["bytes"] += num_bytes

    def finish(self) -> dict[str, Any]:
        """Closes the files, writes ``sentences.json`` and returns it."""
        return self._files.finish(
            "sentences",
            sequence_length=self._length,
            token_dtype=self._dtype.name,
            targets=self._tokens,
            sentences=self._sentences,
            rows=self._spans,
            **self._counts,
        )

    def close(self) -> None:
        """Closes the files; they are whole only after `finish`."""
        self._files.close()


class SentenceStore:
    """Random access to the records that a `SentenceWriter` wrote. Pickles as its path, as `PackedRows` does.

    Attributes:
      sequence_length: ``L``.
      documents, bytes, targets: documents, their UTF-8 bytes, and their text tokens, in all.
      digest: a hash of the content.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        description = json.loads((directory / "sentences.json").read_text())
        self.sequence_length: int = description["sequence_length"]
        self.documents: int = description["documents"]
        self.bytes: int = description["bytes"]
        self.targets: int = description["targets"]
        self.digest: str = description["digest"]
        self._rows: int = description["rows"]
        self._tokens = map_file(directory, "tokens", description["token_dtype"])
        self._words = map_file(directory, "words", "uint8")
        self._starts = map_file(directory, "sentences", "int64")
        self._spans = map_file(directory, "spans", "int64").reshape(-1, 3)

    def __reduce__(self):
        return SentenceStore, (self._directory,)

    def __len__(self) -> int:
        return self._rows

    def span(self, row: int) -> tuple[int, int, int]:
        """A record: its first sentence, the one after its last, and the one after its document's last."""
        first, end, document_end = self._spans[row].tolist()
        return first, end, document_end

    def size(self, first: int, end: int) -> int:
        """Tokens in sentences ``first <= s < end``."""
        return int(self._starts[end] - self._starts[first])

    def fitting(self, first: int, end: int, room: int) -> int:
        """The largest ``e <= end`` such that sentences ``first <= s < e`` have at most ``room`` tokens."""
        return first + int(np.searchsorted(self._starts[first + 1 : end + 1], self._starts[first] + room, side="right"))

    def read(self, first: int, end: int) -> tuple[Int64[np.ndarray, "n"], Bool[np.ndarray, "n"]]:
        """Tokens of sentences ``first <= s < end``, and which of them begin a word."""
        part = slice(int(self._starts[first]), int(self._starts[end]))
        return self._tokens[part].astype(np.int64), self._words[part].astype(bool)


def spans_of(sizes: Int64[np.ndarray, "sentences"], room: int) -> list[tuple[int, int]]:
    """Cuts a document into runs ``(first, end)`` of sentences that have at most ``room`` tokens together.

    Each run is as long as can be; the last takes a sentence from the one before, if that can spare it, rather than
    being one alone, of which no pair can be made.

    Args:
      sizes: tokens in each sentence, each at most ``room``.
      room: tokens in a row.
    """
    spans, first, used = [], 0, 0
    for index, size in enumerate(sizes.tolist()):
        if used + size > room:
            spans.append((first, index))
            first, used = index, 0
        used += size
    spans.append((first, len(sizes)))
    if len(spans) > 1:
        (start, cut), (_, end) = spans[-2:]
        if end - cut == 1 and cut - start > 2 and sizes[cut - 1 :].sum() <= room:
            spans[-2:] = [(start, cut - 1), (cut - 1, end)]
    return spans
