"""Global batches of packed rows, the same on any number of hosts and worker processes.

The pipeline (Grain's Dataset API) carries row numbers and reads rows last: numbers of each source -> shuffled anew in
each epoch -> repeated for ever -> mixed by weight -> this host's share of each global batch -> batched -> rows read.
The order of rows is a pure function of position, data, weights and seed. The state is therefore one number, the rows
that all hosts together have consumed, and it may be restored on another number of hosts or workers, or with another
global batch size.

Grain's `ElasticIterator` keeps the same state, but deals rows to hosts like cards: host ``i`` of ``n`` gets rows
``i, i + n, ...``. The set of rows in a global batch is then the same for every ``n``, yet their order, and with it
which rows share a microbatch, is not. Here each microbatch is a contiguous part of the global batch, and each host gets
contiguous parts of every microbatch, so that the microbatches are the same on any number of hosts.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, SupportsIndex

import grain
import numpy as np
from absl import flags

from ml.data.prepared import Batch, Prepared
from ml.errors import UserError


class Loader(Iterator[Batch]):
    """Endless iterator over this host's part of the global batches; made by `make_loader`.

    Batches are assembled ahead in background threads or processes; `close` ends those.
    """

    def __init__(self, order: grain.MapDataset, read: "_Read", share: "_Share", num_workers: int, fingerprint: str):
        self._order = order
        self._read = read
        self._share = share
        self._num_workers = num_workers
        self._fingerprint = fingerprint
        self._next_row = 0
        self._batches: Any = None

    def __next__(self) -> Batch:
        """The next batch: this host's rows of the first microbatch before those of the second.

        What arrays there are says `ml.data.rows.gather`, or for an encoder `ml.data.masking.empty_pairs` and
        `ml.data.labelled.empty_labelled`.
        """
        if self._batches is None:
            rows = _HostRows(self._order, self._next_row, self._share)
            dataset = rows.batch(len(self._share.rows), drop_remainder=True).map(self._read)
            # Rows come out of the page cache, so threads beyond two would only contend for the interpreter.
            ahead = 1 if self._num_workers else 2
            stream = dataset.to_iter_dataset(grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead))
            if self._num_workers:
                if not flags.FLAGS.is_parsed():  # Grain reads its own settings from there; the defaults are right
                    flags.FLAGS.mark_as_parsed()
                stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._num_workers))
            self._batches = iter(stream)
        batch = next(self._batches)
        self._next_row += self._share.global_batch_size
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position, as JSON: the same on every host after the same number of batches."""
        return {"next_row": self._next_row, "fingerprint": self._fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a state that `get_state` gave, here or on any other number of hosts and workers.

        Raises:
          UserError: the state belongs to other data, another tokenizer, row length, mixture or seed.
        """
        if state["fingerprint"] != self._fingerprint:
            raise UserError(
                "data: the checkpoint was written with other data (sources, weights, tokenizer, sequence_length or "
                "seed differ, or a file changed): restore those, or start in a new workdir"
            )
        self.close()
        self._next_row = int(state["next_row"])

    def close(self) -> None:
        """Stops background work; a later `__next__` starts it again at the same position."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None


class HeldoutBatches:
    """One fixed pass over the held-out rows; can be iterated any number of times. Made by `heldout_batches`."""

    def __init__(self, rows: int, read: "_Read", share: "_Share"):
        self._rows = rows
        self._read = read
        self._share = share

    def __len__(self) -> int:
        """Batches in a pass, the same on every host."""
        return -(-self._rows // self._share.global_batch_size)

    def __iter__(self) -> Iterator[Batch]:
        padded = len(self) * self._share.global_batch_size  # numbers beyond the last row are read as padding
        rows = _HostRows(grain.MapDataset.range(padded), 0, self._share)
        dataset = rows.batch(len(self._share.rows)).map(self._read)
        return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)))


def make_loader(
    prepared: Prepared,
    *,
    global_batch_size: int,
    seed: int,
    shard_index: int | Sequence[int] = 0,
    shard_count: int = 1,
    microbatches: int = 1,
    num_workers: int | None = None,
) -> Loader:
    """An endless, shuffled, weighted mixture of the training rows.

    Args:
      prepared: from `ml.data.prepare`.
      global_batch_size: rows in a batch of all hosts together; a multiple of ``shard_count * microbatches``.
      seed: of the shuffle.
      shard_index: which of ``shard_count`` contiguous parts of each microbatch are this host's: one, or several in
        ascending order (`ml.parallel.loader_share`); hosts may share parts.
      shard_count: parts.
      microbatches: contiguous parts of the global batch that are cut up one by one.
      num_workers: processes that assemble batches; ``None`` takes ``prepared.config.num_workers``. With any, the
        program's main module must be importable (the ``if __name__ == "__main__"`` guard).

    Raises:
      UserError: the batch cannot be divided into the parts.
    """
    share = _Share(global_batch_size, shard_index, shard_count, microbatches)
    stores = [source.train for source in prepared.sources]
    weights = [source.weight for source in prepared.sources]
    read = _Read(prepared.reader(stores, _derived_seed(seed, len(stores))))
    records = sum(map(len, stores))
    first = 0
    numbers: list[Any] = []
    for index, store in enumerate(stores):
        rows = grain.MapDataset.range(first, first + len(store))
        # Grain shuffles epoch e with seed + e: seeds next to each other would share epochs, so they are spread first.
        rows = rows.shuffle(seed=_derived_seed(seed, index)).repeat()
        if prepared.drawn is not None:
            rows = rows.map_with_index(_NumberOfEpoch(len(store), records))
        numbers.append(rows)
        first += len(store)
    order = numbers[0] if len(numbers) == 1 else grain.MapDataset.mix(numbers, weights)
    contents: list[Any] = [(store.digest, weight / sum(weights)) for store, weight in zip(stores, weights, strict=True)]
    if prepared.drawn is not None:
        contents.append(prepared.drawn)
    fingerprint = hashlib.blake2b(json.dumps([seed, contents]).encode(), digest_size=16).hexdigest()
    workers = prepared.config.num_workers if num_workers is None else num_workers
    return Loader(order, read, share, workers, fingerprint)


def heldout_batches(
    prepared: Prepared,
    *,
    global_batch_size: int,
    shard_index: int | Sequence[int] = 0,
    shard_count: int = 1,
    side: Literal["heldout", "train"] = "heldout",
) -> HeldoutBatches:
    """One pass over the held-out rows of all sources, in a fixed order; the last batch is filled up with padding.

    The sum of ``loss_mask`` over all batches and hosts is the number of held-out targets, whatever the batch size. An
    encoder's pairs and masks are the same in every pass.

    Args:
      prepared: from `ml.data.prepare`.
      global_batch_size: rows in a batch of all hosts together.
      shard_index, shard_count: this host's parts, as in `make_loader`.
      side: ``train`` passes over the training rows instead, to measure a model on the whole of a text.

    Raises:
      UserError: the batch cannot be divided into the parts.
    """
    share = _Share(global_batch_size, shard_index, shard_count)
    stores = [getattr(source, side) for source in prepared.sources]
    return HeldoutBatches(sum(map(len, stores)), _Read(prepared.reader(stores, None)), share)


class _Share:
    """Which rows of a global batch are this host's: ``rows``, ascending."""

    def __init__(
        self, global_batch_size: int, shard_index: int | Sequence[int], shard_count: int, microbatches: int = 1
    ):
        parts = [shard_index] if isinstance(shard_index, int) else list(shard_index)
        if not parts or sorted(set(parts)) != parts or parts[0] < 0 or parts[-1] >= shard_count:
            raise ValueError(f"shard_index={shard_index} must lie in [0, shard_count={shard_count}), ascending")
        least = shard_count * microbatches
        if global_batch_size < 1 or global_batch_size % least:
            raise UserError(
                f"global batch size {global_batch_size} is not a positive multiple of {shard_count} parts x "
                f"{microbatches} microbatches: use {max(1, -(-global_batch_size // least)) * least}"
            )
        numbers = np.arange(global_batch_size).reshape(microbatches, shard_count, -1)
        self.global_batch_size = global_batch_size
        self.rows: list[int] = numbers[:, parts].ravel().tolist()


class _HostRows(grain.MapDataset):
    """Of the global order from position ``start`` on, the entries that fall into this host's part of each batch."""

    def __init__(self, order: grain.MapDataset, start: int, share: _Share):
        super().__init__(order)
        self._start = start
        self._share = share

    def __len__(self) -> int:
        return (len(self._parent) - self._start) // self._share.global_batch_size * len(self._share.rows)

    def __getitem__(self, index: SupportsIndex | slice):
        if isinstance(index, slice):
            return self.slice(index)
        step, row = divmod(int(index), len(self._share.rows))
        return self._parent[self._start + step * self._share.global_batch_size + self._share.rows[row]]


class _Read(grain.transforms.Map):
    """Reads a batch of row numbers."""

    def __init__(self, read: Callable[[np.ndarray], Batch]):
        self.read = read

    def map(self, element: np.ndarray) -> Batch:
        return self.read(np.asarray(element))


class _NumberOfEpoch(grain.transforms.MapWithIndex):
    """Makes the number of a row in an epoch of the number of the row, for what is drawn anew in each epoch."""

    def __init__(self, rows: int, all_rows: int):
        self._rows = rows
        self._all_rows = all_rows

    def map_with_index(self, index: int, element: int) -> int:
        return element + index // self._rows * self._all_rows


def _derived_seed(seed: int, source: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}:{source}".encode(), digest_size=4).digest(), "big")
