"""What to read, how to tokenize it and how to cut it into rows, as data."""

import dataclasses
from typing import Literal

# Two tokens of each sentence, and what stands before, between and behind them.
MIN_PAIR_LENGTH = 7

SourceKind = Literal["python_source", "python_prose", "python_docstrings", "text", "jsonl", "parquet", "array_record"]


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One corpus of documents.

    Attributes:
      kind: the format. ``python_source``: ``.py`` files; ``python_prose``: their docstrings and comments, a document
        for each file; ``python_docstrings``: each docstring a document, labelled with its package; ``text``: UTF-8
        files; ``jsonl``: one JSON object a line; ``parquet``: one row a document; ``array_record``: one record a
        document.
      path: a file, a directory or a glob (``corpus/**/*.txt``); local, or a URL that fsspec opens (``gs://bucket/...``).
        Compressed text and JSONL (``.gz``, ``.bz2``, ``.xz``) are read as they are. Empty is allowed for
        Python's kinds only, and means the standard library of the running interpreter.
      weight: share of this source's rows in a mixture, relative to the other sources' weights.
      text_field: the key (``jsonl``, ``array_record``) or column (``parquet``) that holds the text. Empty, for
        ``array_record`` only: the record itself is the text.
      label_field: the key or column that holds a label (``jsonl``, ``parquet``), read for ``labelled`` data only.
      split_by: for ``text``: a document is a whole ``file``, a ``paragraph`` (ended by a blank line) or a ``line``.
    """

    kind: SourceKind = "python_source"
    path: str = ""
    weight: float = 1.0
    text_field: str = "text"
    label_field: str = "label"
    split_by: Literal["file", "paragraph", "line"] = "file"

    def __post_init__(self):
        if not self.path and not self.kind.startswith("python_"):
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
class MaskedConfig:
    """Rows of two sentences with masked tokens, for an encoder (BERT, Devlin et al. 2019, section 3.1 and A.1).

    A row is ``[CLS] A [SEP] B [SEP]``. Which tokens are masked, where A ends and what B is are drawn anew each epoch.

    Attributes:
      mask_fraction: share of a row's tokens to predict.
      max_predictions: at most so many of them in a row (20 at length 128, 76 or 80 at 512).
      whole_words: masks all tokens of a word or none of them.
      random_next: share of the pairs whose B comes from another document.
      short_fraction: share of the pairs that are cut to a random length, so that short inputs are known too.
    """

    mask_fraction: float = 0.15
    max_predictions: int = 20
    whole_words: bool = False
    random_next: float = 0.5
    short_fraction: float = 0.1

    def __post_init__(self):
        if not 0 < self.mask_fraction < 1:
            raise ValueError(f"mask_fraction={self.mask_fraction} must lie in (0, 1)")
        if self.max_predictions < 1:
            raise ValueError(f"max_predictions={self.max_predictions} must be at least 1")
        for name in ("random_next", "short_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1]")


@dataclasses.dataclass(frozen=True)
class LabelledConfig:
    """Rows of one text and its label, for an encoder's classifier: ``[CLS] text [SEP]``, cut to the row's length.

    Attributes:
      labels: the classes in order; texts with other labels are left out.
      mask_fraction: share of a text's tokens that training reads as [MASK], others in every epoch: a small corpus is
        then not learned by heart from a word or two of each text.
    """

    labels: tuple[str, ...] = ()
    mask_fraction: float = 0.0

    def __post_init__(self):
        if not 0 <= self.mask_fraction < 1:
            raise ValueError(f"mask_fraction={self.mask_fraction} must lie in [0, 1)")
        if len(set(self.labels)) < 2 or len(set(self.labels)) < len(self.labels):
            raise ValueError(f"labels={list(self.labels)}: name two or more classes, each once")


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
      masked: pairs of sentences with masked tokens, for an encoder; ``None``: packed documents, for a decoder.
      labelled: texts with labels, for an encoder's classifier.
    """

    sources: tuple[SourceConfig, ...] = (SourceConfig(),)
    tokenizer: TokenizerConfig = TokenizerConfig()
    sequence_length: int = 1024
    heldout_fraction: float = 0.02
    cache_dir: str = ""
    num_workers: int = 0
    masked: MaskedConfig | None = None
    labelled: LabelledConfig | None = None

    @property
    def for_encoder(self) -> bool:
        """Whether rows are an encoder's."""
        return self.masked is not None or self.labelled is not None

    @property
    def predictions(self) -> int:
        """Positions of a row whose logits are computed, at most."""
        if self.masked is not None:
            return min(self.masked.max_predictions, self.sequence_length)
        return self.sequence_length if self.labelled is None else 1

    def __post_init__(self):
        if self.masked is not None and self.labelled is not None:
            raise ValueError("masked and labelled are two kinds of rows: set one of them")
        if not self.sources:
            raise ValueError("sources is empty: name at least one corpus")
        if self.sequence_length < 2:
            raise ValueError(f"sequence_length={self.sequence_length} must be at least 2")
        if self.masked is not None and self.sequence_length < MIN_PAIR_LENGTH:
            raise ValueError(f"sequence_length={self.sequence_length}: a pair of sentences needs {MIN_PAIR_LENGTH}")
        if not 0 <= self.heldout_fraction < 1:
            raise ValueError(f"heldout_fraction={self.heldout_fraction} must lie in [0, 1)")
        if self.num_workers < 0:
            raise ValueError(f"num_workers={self.num_workers} must not be negative")
