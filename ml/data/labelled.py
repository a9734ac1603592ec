"""Labelled texts on disk and in batches, for an encoder's classifier: ``[CLS] text [SEP]``, cut to a row."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from ml.data.flat_files import FlatFiles, map_file, token_dtype

Batch = dict[str, np.ndarray]

# Before and behind the text.
SPECIAL_TOKENS = 2


class LabelledWriter:
    """Appends texts to ``tokens.bin``, where each begins to ``texts.bin``, and what it is to ``labels.bin``."""

    def __init__(self, directory: Path, *, sequence_length: int, vocab_size: int):
        self._files = FlatFiles(directory, ("tokens", "texts", "labels"))
        self._length = sequence_length
        self._dtype = token_dtype(vocab_size)
        self._tokens = 0
        self._counts = {"documents": 0, "bytes": 0}
        self._files.append("texts", np.zeros(1, np.int64))

    def add(self, encoded: tuple[Sequence[int], int], num_bytes: int) -> None:
        """Adds a text.

        Args:
          encoded: its ids, of which those beyond a row are left out, and the number of its label.
          num_bytes: of UTF-8 that it has.
        """
        ids, label = encoded
        kept = np.asarray(ids, self._dtype)[: self._length - SPECIAL_TOKENS]
        self._files.append("tokens", kept)
        self._tokens += len(kept)
        self._files.append("texts", np.array([self._tokens], np.int64))
        self._files.append("labels", np.array([label], np.uint16))
        self._counts["documents"] += 1
        self._counts["bytes"] += num_bytes

    def finish(self) -> dict[str, Any]:
        """Closes the files, writes ``labelled.json`` and returns it."""
        return self._files.finish(
            "labelled",
            sequence_length=self._length,
            token_dtype=self._dtype.name,
            targets=self._counts["documents"],
            rows=self._counts["documents"],
            **self._counts,
        )

    def close(self) -> None:
        """Closes the files; they are whole only after `finish`."""
        self._files.close()


class LabelledStore:
    """Random access to what a `LabelledWriter` wrote. Pickles as its path, as `PackedRows` does.

    Attributes:
      sequence_length: ``L``.
      documents, bytes, targets: texts, their UTF-8 bytes, and their labels, in all.
      digest: a hash of the content.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        description = json.loads((directory / "labelled.json").read_text())
        self.sequence_length: int = description["sequence_length"]
        self.documents: int = description["documents"]
        self.bytes: int = description["bytes"]
        self.targets: int = description["targets"]
        self.digest: str = description["digest"]
        self._tokens = map_file(directory, "tokens", description["token_dtype"])
        self._starts = map_file(directory, "texts", "int64")
        self._labels = map_file(directory, "labels", "uint16")

    def __reduce__(self):
        return LabelledStore, (self._directory,)

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, row: int) -> tuple[Int[np.ndarray, "n"], int]:
        """Ids of a text, and the number of its label."""
        return self._tokens[self._starts[row] : self._starts[row + 1]], int(self._labels[row])


@dataclasses.dataclass(frozen=True)
class LabelledReader:
    """Reads numbered texts of several stores into batches.

    Attributes:
      stores: of one length; together they are one long list of texts.
      ids: of the special tokens ``cls``, ``sep``, ``mask`` and ``pad``.
      mask_fraction: share of a text's tokens that are replaced by ``mask``.
      seed: of which these are; ``None``: none is, and beyond the last text there is padding (evaluation).
    """

    stores: Sequence[LabelledStore]
    ids: Mapping[str, int]
    mask_fraction: float = 0.0
    seed: int | None = None

    def __call__(self, numbers: Int[np.ndarray, "batch"]) -> Batch:
        """The batch of these numbers, ``text + texts * epoch``, as `empty_labelled` describes it."""
        batch = empty_labelled(len(numbers), self.stores[0].sequence_length)
        batch["tokens"][:] = self.ids["pad"]
        ends = np.cumsum([len(store) for store in self.stores])
        for place, number in enumerate(np.asarray(numbers).tolist()):
            if self.seed is None and number >= ends[-1]:
                continue
            row = number % int(ends[-1])
            owner = int(np.searchsorted(ends, row, side="right"))
            store = self.stores[owner]
            text, label = store.read(row - int(ends[owner]) + len(store))
            if self.seed is not None and self.mask_fraction:
                rng = np.random.Generator(np.random.Philox(key=[self.seed, number]))  # as in `masking.PairReader`
                text = np.where(rng.random(len(text)) < self.mask_fraction, self.ids["mask"], text)
            size = len(text) + SPECIAL_TOKENS
            batch["tokens"][place, :size] = [self.ids["cls"], *text, self.ids["sep"]]
            batch["segment_ids"][place, :size] = 1
            batch["targets"][place] = label
            batch["loss_mask"][place] = 1.0
        return batch


def empty_labelled(rows: int, length: int) -> Batch:
    """A batch of padding, every array zero.

    Returns:
      int32 ``[rows, length]``: ``tokens``; ``segment_ids``, 1 where there is text; ``token_types``, all 0. ``[rows,
      1]``: int32 ``targets``, the labels; float32 ``loss_mask``, 1 but for rows of padding.
    """
    batch: Batch = {name: np.zeros((rows, length), np.int32) for name in ("tokens", "segment_ids", "token_types")}
    return batch | {"targets": np.zeros((rows, 1), np.int32), "loss_mask": np.zeros((rows, 1), np.float32)}
