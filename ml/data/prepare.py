"""From configuration to packed rows: read, split off held-out documents, train or load the tokenizer, pack, cache.

A cache folder holds one folder per trained tokenizer and one per packed source, each named by a fingerprint of
everything that went into it, so that a second start, or another experiment on the same data, reads nothing again.
"""

import contextlib
import dataclasses
import functools
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt32

from ml.data.cache import build_once
from ml.data.config import DataConfig
from ml.data.labelled import LabelledReader, LabelledStore, LabelledWriter, empty_labelled
from ml.data.masking import PairReader, empty_pairs
from ml.data.prepared import Batch, Prepared, PreparedSource
from ml.data.prose import sentences
from ml.data.rows import PackedRows, RowWriter, empty_batch, gather
from ml.data.sentences import SentenceStore, SentenceWriter
from ml.data.sources import Document, Source, is_heldout
from ml.data.tokenizer import Tokenizer
from ml.errors import UserError

_log = logging.getLogger(__name__)

# Part of every fingerprint: raise it when the files' layout or the way they are made changes.
_FORMAT = 1
_GROUP_CHARACTERS = 2**21
_PIECE_CHARACTERS = 2**19

Store = PackedRows | SentenceStore | LabelledStore
# (masked, labelled) -> name in the cache, and what reads it.
_STORES: dict[tuple[bool, bool], tuple[str, Any]] = {
    (False, False): ("rows", PackedRows),
    (True, False): ("sentences", SentenceStore),
    (False, True): ("labelled", LabelledStore),
}


@dataclasses.dataclass(frozen=True)
class PackedSource(PreparedSource):
    """One source, tokenized and packed.

    Attributes:
      heldout_file: the held-out documents as UTF-8, one right after another.
    """

    train: Store
    heldout: Store
    heldout_file: Path


@dataclasses.dataclass(frozen=True)
class PreparedText(Prepared):
    """What `prepare` leaves: everything the loaders and the evaluation need.

    Bits per byte of the held-out text is the loss in nats, summed over all targets of `heldout_batches`, divided by
    ``ln 2 * heldout_bytes``: every text token and every document's end is predicted exactly once, each chunk from its
    own beginning on, so the number stands beside ``8 * compressed size / heldout_bytes`` of a compressor. (It is only
    as fair as the tokenizer is lossless: an unknown token or a normalizer loses text that a compressor keeps.)
    """

    config: DataConfig
    sources: tuple[PackedSource, ...]
    tokenizer: Tokenizer

    @property
    def heldout_bytes(self) -> int:
        """UTF-8 bytes of the held-out documents."""
        return sum(source.heldout.bytes for source in self.sources)

    @property
    def train_bytes(self) -> int:
        """UTF-8 bytes of the training documents."""
        return sum(source.train.bytes for source in self.sources)

    def heldout_text(self) -> bytes:
        """The held-out documents as UTF-8, ``heldout_bytes`` long, for a compressor to be compared with."""
        return b"".join(source.heldout_file.read_bytes() for source in self.sources)

    @property
    def codes_text(self) -> bool:
        """A decoder's loss does; an encoder sees what stands behind a token."""
        return not self.config.for_encoder

    @property
    def drawn(self) -> Any:
        """Pairs of sentences and their masks are, and which tokens of labelled texts are hidden."""
        if self.config.labelled is not None and self.config.labelled.mask_fraction:
            return {"hidden": self.config.labelled.mask_fraction}
        return None if self.config.masked is None else dataclasses.asdict(self.config.masked)

    def reader(self, stores: Sequence[Any], seed: int | None) -> Callable[[np.ndarray], Batch]:
        """Packed rows as they are, pairs of sentences drawn by ``seed``, or labelled texts."""
        if self.config.labelled is not None:
            return LabelledReader(stores, self.tokenizer.encoder_ids(), self.config.labelled.mask_fraction, seed)
        if self.config.masked is None:
            return functools.partial(gather, stores)
        text = np.setdiff1d(np.arange(self.tokenizer.vocab_size), list(self.tokenizer.special_ids()))
        return PairReader(stores, self.config.masked, self.tokenizer.encoder_ids(), text, seed)

    def save(self, folder: Path) -> None:
        """Keeps the tokenizer."""
        self.tokenizer.save(folder)


def prepare(config: DataConfig, workdir: str | os.PathLike[str], *, where: str = "data") -> PreparedText:
    """Makes the corpus ready, or finds it ready from an earlier call.

    Every process of a distributed run calls this: on one machine or a shared filesystem one of them does the work while
    the others wait; on machines with disks of their own each does it, with the same outcome (see `build_once`).

    Args:
      config: sources, tokenizer and row length.
      workdir: the cache is ``workdir/data`` unless ``config.cache_dir`` names another.
      where: the name of ``config`` in messages.

    Raises:
      UserError: a missing or malformed file, an empty corpus, nothing left to train on or to hold out, a full disk.
    """
    cache = Path(config.cache_dir or Path(workdir) / "data").expanduser()
    if "://" in (config.cache_dir or str(workdir)):
        raise UserError(f"{where}.cache_dir: packed rows are mapped into memory: set it to a folder on a local disk")
    sources = [Source(source, f"{where}.sources[{i}]") for i, source in enumerate(config.sources)]
    tokenizer = _tokenizer(config, sources, cache, where)
    prepared = []
    for source in sources:
        kind, store = _STORES[config.masked is not None, config.labelled is not None]
        key = _key(
            *(kind, source.fingerprint, tokenizer.fingerprint, config.heldout_fraction, config.sequence_length),
            *(config.labelled.labels if config.labelled else ()),
        )
        folder = build_once(cache / f"{kind}-{key}", _Packing(config, source, tokenizer))
        prepared.append(
            PackedSource(
                name=f"{source.config.kind}:{source.config.path or 'standard library'}",
                weight=source.config.weight,
                train=store(folder / "train"),
                heldout=store(folder / "heldout"),
                heldout_file=folder / "heldout.txt",
            )
        )
    result = PreparedText(config, tuple(prepared), tokenizer)
    if config.heldout_fraction and not result.heldout_rows:
        documents = sum(source.train.documents for source in prepared)
        raise UserError(
            f"{where}.heldout_fraction={config.heldout_fraction} holds out none of {documents} documents: raise it, "
            "cut text into more documents with split_by='paragraph', or set it to 0 to train without evaluation"
        )
    return result


class _Packing:
    """Builds one source's folder: ``train/``, ``heldout/`` and ``heldout.txt``."""

    def __init__(self, config: DataConfig, source: Source, tokenizer: Tokenizer):
        self._config = config
        self._source = source
        self._tokenizer = tokenizer

    def __call__(self, folder: Path) -> None:
        source, fraction, began = self._source, self._config.heldout_fraction, time.monotonic()
        with contextlib.ExitStack() as stack:
            train = stack.enter_context(contextlib.closing(self._writer(folder / "train")))
            heldout = stack.enter_context(contextlib.closing(self._writer(folder / "heldout")))
            heldout_file = stack.enter_context(open(folder / "heldout.txt", "wb"))
            for document, encoded in self._encode():
                text = document.text.encode()
                if is_heldout(document.key, fraction):
                    heldout.add(encoded, len(text))
                    heldout_file.write(text)
                else:
                    train.add(encoded, len(text))
            counts, held = train.finish(), heldout.finish()
        if not counts["documents"]:
            path = source.config.path or "the standard library"
            if held["documents"]:
                raise UserError(
                    f"{source.where}: all {held['documents']} documents of {path} are held out: lower heldout_fraction="
                    f"{fraction}, or cut the text into more documents"
                )
            raise UserError(f"{source.where}: no text in the {len(source.files)} file(s) of {path}: give another path")
        _log.info(
            "%s: %d documents, %d tokens in %d rows of %d (%.1f%% full); %d documents held out; %.1f s",
            source.where,
            counts["documents"],
            counts["targets"],
            counts["rows"],
            counts["sequence_length"],
            100 * counts["targets"] / (counts["rows"] * counts["sequence_length"]),
            held["documents"],
            time.monotonic() - began,
        )

    def _encode(self) -> Iterator[tuple[Document, Any]]:
        documents, labelled = self._source.documents(), self._config.labelled
        if self._config.masked is not None:
            return _encode_sentences(documents, self._tokenizer)
        if labelled is None:
            return _encode(documents, self._tokenizer)
        number = {label: index for index, label in enumerate(labelled.labels)}
        encoded = _encode((document for document in documents if document.label in number), self._tokenizer)
        return ((document, (ids, number[document.label])) for document, ids in encoded)

    def _writer(self, directory: Path) -> Any:
        tokenizer, length = self._tokenizer, self._config.sequence_length
        if self._config.for_encoder:
            writer = SentenceWriter if self._config.labelled is None else LabelledWriter
            return writer(directory, sequence_length=length, vocab_size=tokenizer.vocab_size)
        return RowWriter(
            directory,
            sequence_length=length,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            vocab_size=tokenizer.vocab_size,
        )


def _tokenizer(config: DataConfig, sources: list[Source], cache: Path, where: str) -> Tokenizer:
    """Loads the configured tokenizer, or trains one on the training documents and keeps it in the cache."""
    settings, encoder = config.tokenizer, config.for_encoder
    if settings.path:
        tokenizer = Tokenizer.load(settings.path, f"{where}.tokenizer.path")
        if encoder:
            tokenizer.encoder_ids(f"{where}.tokenizer.path")
        return tokenizer
    corpus = [(source.fingerprint, source.config.weight) for source in sources]
    purpose = ("encoder",) if encoder else ()
    key = _key("tokenizer", corpus, config.heldout_fraction, settings.vocab_size, settings.sample_bytes, *purpose)

    def train(folder: Path) -> None:
        began = time.monotonic()
        tokenizer = Tokenizer.train(_sample(config, sources), settings.vocab_size, encoder=encoder)
        tokenizer.save(folder)
        _log.info("trained a tokenizer of %d entries in %.1f s", tokenizer.vocab_size, time.monotonic() - began)

    return Tokenizer.load(build_once(cache / f"tokenizer-{key}", train))


def _sample(config: DataConfig, sources: list[Source]) -> Iterator[str]:
    """Training text for the tokenizer: a share of ``sample_bytes`` of each source, by weight, never held-out text."""
    total = sum(source.config.weight for source in sources)
    for source in sources:
        budget = int(config.tokenizer.sample_bytes * source.config.weight / total)
        for document in source.documents(scattered=True):
            if is_heldout(document.key, config.heldout_fraction):
                continue
            text = document.text[:budget]  # characters: at most this many, and never fewer than the bytes allow
            yield text
            budget -= len(text.encode())
            if budget <= 0:
                break


def _encode(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[tuple[Document, UInt32[np.ndarray, "n"]]]:
    """Tokenizes a stream in groups with enough text to keep all cores busy, and not more than that in memory."""
    parts: list[np.ndarray] = []
    for group in _groups(documents):
        ids_of_pieces = tokenizer.encode_batch([piece for piece, _ in group])
        for (_, finished), ids in zip(group, ids_of_pieces, strict=True):
            parts.append(np.array(ids, np.uint32))
            if finished is not None:
                yield finished, np.concatenate(parts)
                parts = []


def _encode_sentences(
    documents: Iterable[Document], tokenizer: Tokenizer
) -> Iterator[tuple[Document, list[tuple[list[int], list[bool]]]]]:
    """Cuts each document into sentences; of each its ids and which of them begin a word. Grouped as `_encode` does."""
    for group in _document_groups(documents):
        cut = [sentences(document.text) for document in group]
        encoded = iter(tokenizer.encode_words([sentence for parts in cut for sentence in parts]))
        for document, parts in zip(group, cut, strict=True):
            of_document = [next(encoded) for _ in parts]
            yield document, [(ids, words) for ids, words in of_document if ids]


def _document_groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    group: list[Document] = []
    characters = 0
    for document in documents:
        group.append(document)
        characters += len(document.text)
        if characters >= _GROUP_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _groups(documents: Iterable[Document]) -> Iterator[list[tuple[str, Document | None]]]:
    """Yields lists of ``(piece of text, the document that it finishes, if it does)``."""
    group: list[tuple[str, Document | None]] = []
    characters = 0
    for document in documents:
        pieces = _pieces(document.text)
        for number, piece in enumerate(pieces, 1):
            group.append((piece, document if number == len(pieces) else None))
            characters += len(piece)
            if characters >= _GROUP_CHARACTERS:
                yield group
                group, characters = [], 0
    if group:
        yield group


def _pieces(text: str) -> list[str]:
    """Cuts a very long text at line ends, since the tokenizer needs some hundred bytes of memory per byte of input."""
    pieces = []
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        end = text.rfind("\n", start, start + _PIECE_CHARACTERS) + 1 or start + _PIECE_CHARACTERS
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def _key(*parts: object) -> str:
    return hashlib.blake2b(repr((_FORMAT, *parts)).encode(), digest_size=12).hexdigest()


def padding(config: DataConfig, rows: int) -> Batch:
    """A batch of nothing, with the arrays that batches of ``config`` have."""
    if config.labelled is not None:
        return empty_labelled(rows, config.sequence_length)
    if config.masked is not None:
        return empty_pairs(rows, config.sequence_length, config.masked)
    return empty_batch(rows, config.sequence_length)
