"""What to read, how to tokenize it and how to cut it into rows, as data."""

import dataclasses
from typing import Literal

SourceKind = Literal["python_source", "text", "jsonl", "parquet", "array_record"]


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One corpus of documents.

    Attributes:
      kind: the format. ``python_source``: ``.py`` files; ``text``: UTF-8 files; ``jsonl``: one JSON object a line;
        ``parquet``: one row a document; ``array_record``: one record a document.
      path: a file, a directory or a glob (``corpus/**/*.txt``); local, or a URL that fsspec opens (``gs://bucket/...``).
        Compressed text and JSONL (``.gz``, ``.bz2``, ``.xz``) are read as they are. Empty is allowed for
        ``python_source`` only, and means the standard library of the running interpreter.
      weight: share of this source's rows in a mixture, relative to the other sources' weights.
      text_field: the key (``jsonl``, ``array_record``) or column (``parquet``) that holds the text. Empty, for
        ``array_record`` only: the record itself is the text.
      split_by: for ``text``: a document is a whole ``file``, a ``paragraph`` (ended by a blank line) or a ``line``.
    """

    kind: SourceKind = "python_source"
    path: str = ""
    weight: float = 1.0
    text_field: str = "text"
    split_by: Literal["file", "paragraph", "line"] = "file"

    def __post_init__(self):
        if not self.path and self.kind != "python_source":
            raise ValueError(f"path is empty: give the file, directory or glob of the {self.kind!r} source")
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"weight={self.weight} must be positive: remove the source to leave it out")
        if not self.text_field and self.kind in ("jsonl", "parquet"):
            raise ValueError(f"text_field is empty: name the field that holds the text of the {self.kind!r} source")


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Where the tokenizer comes from.

    Attributes:
      path: a ``tokenizer.json``, or a folder that holds one (with ``tokenizer_config.json``, if there is one, for the
        end-of-text token). Empty: train a byte-level BPE on the training documents.
      vocab_size: entries of the trained vocabulary, the 256 bytes and the end-of-text token included; not read when
        ``path`` is given.
      sample_bytes: at most this many UTF-8 bytes of the corpus are shown to the trainer.
    """

    path: str = ""
    vocab_size: int = 8192
    sample_bytes: int = 32 * 2**20

    def __post_init__(self):
        if self.vocab_size < 257:
            raise ValueError(f"vocab_size={self.vocab_size} must be at least 257: 256 bytes and the end-of-text token")
        if self.sample_bytes < 1:
            raise ValueError(f"sample_bytes={self.sample_bytes} must be positive")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Everything from files to rows of tokens.

    Attributes:
      sources: the corpora, mixed by weight.
      tokenizer: see `TokenizerConfig`.
      sequence_length: tokens in a row, ``L``.
      heldout_fraction: share of the documents, chosen by a hash of their identity, kept for evaluation only.
      cache_dir: where packed rows are kept between runs; empty means ``data/`` in the work directory.
      num_workers: processes that assemble batches; 0 means threads of the training process, enough for most.
    """

    sources: tuple[SourceConfig, ...] = (SourceConfig(),)
    tokenizer: TokenizerConfig = TokenizerConfig()
    sequence_length: int = 1024
    heldout_fraction: float = 0.02
    cache_dir: str = ""
    num_workers: int = 0

    def __post_init__(self):
        if not self.sources:
            raise ValueError("sources is empty: name at least one corpus")
        if self.sequence_length < 2:
            raise ValueError(f"sequence_length={self.sequence_length} must be at least 2")
        if not 0 <= self.heldout_fraction < 1:
            raise ValueError(f"heldout_fraction={self.heldout_fraction} must lie in [0, 1)")
        if self.num_workers < 0:
            raise ValueError(f"num_workers={self.num_workers} must not be negative")
