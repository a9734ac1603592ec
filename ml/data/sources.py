"""Reads documents out of Python source, text, JSONL, Parquet and ArrayRecord files, streaming, one at a time."""

import contextlib
import hashlib
import io
import json
import logging
import os
import sysconfig
import tempfile
import tokenize
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ml.data.config import SourceConfig
from ml.data.files import SourceFile, find_files, listing_fingerprint
from ml.data.prose import docstrings, prose
from ml.errors import UserError, nearest

_log = logging.getLogger(__name__)

_NOT_CORPUS = ("site-packages", "dist-packages", "__pycache__", "node_modules")
# Distributions ship the interpreter's own tests separately or not at all: without them the standard library is nearly
# the same corpus on every machine, and small enough to tokenize in seconds.
_STDLIB_TESTS = ("test", "tests", "idle_test")
_TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text")


class Document(NamedTuple):
    """One document.

    Attributes:
      key: its identity, from which its place (training or held out) is drawn: a file's relative path where a document
        is a file, else the text itself, so that equal records never fall on both sides.
      text: never empty, and always encodable as UTF-8.
      label: what it is, where the source tells.
    """

    key: str
    text: str
    label: str = ""


class Source:
    """The documents of one `SourceConfig`.

    Listing happens at construction (a missing file is told at once), reading in `documents`.

    Attributes:
      fingerprint: a hash over what is read: the settings and every file's name, size and version.
    """

    def __init__(self, config: SourceConfig, where: str = "data.sources[0]"):
        """Raises `UserError` where ``config.path`` leads to nothing; ``where`` names the field in messages."""
        self.config = config
        self.where = where
        suffixes, self._read = _READERS[config.kind]
        skip: tuple[str, ...] = _NOT_CORPUS if config.kind.startswith("python_") else ()
        path = config.path
        if not path:
            path = sysconfig.get_path("stdlib")
            skip += _STDLIB_TESTS
        if suffixes and not config.kind.startswith("python_"):
            suffixes += tuple(
                s + c for s in suffixes for c in (".gz", ".bz2", ".xz") if config.kind in ("text", "jsonl")
            )
        self.files = find_files(path, suffixes, f"{where}.path", skip_directories=skip)
        # An installed standard library is told apart by its sizes; modification times differ from machine to machine.
        listing = listing_fingerprint(self.files, with_version=bool(config.path))
        settings = repr((config.kind, config.text_field, config.split_by, config.label_field, listing))
        self.fingerprint = hashlib.blake2b(settings.encode(), digest_size=16).hexdigest()

    def documents(self, *, scattered: bool = False) -> Iterator[Document]:
        """Yields every document that is not empty, in an order that depends on the files alone.

        Args:
          scattered: visit the files in the order of a hash of their names, so that a beginning is a fair sample.

        Raises:
          UserError: a malformed record (``file:line``), a missing field or column, an unreadable file.
        """
        files = sorted(self.files, key=lambda file: stable_hash(file.name)) if scattered else self.files
        for file in files:
            for document in self._read(file, self):
                if document.text:
                    yield document


def stable_hash(key: str) -> int:
    """A 64-bit hash that is the same on every machine and in every run, unlike Python's ``hash``."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def is_heldout(key: str, fraction: float) -> bool:
    """Whether the document of this key belongs to the held-out share; raising ``fraction`` only ever adds documents."""
    return stable_hash("heldout:" + key) < fraction * 2.0**64


def _read_python(file: SourceFile, source: Source) -> Iterator[Document]:
    """Decodes as the interpreter would: a byte-order mark or coding line, else UTF-8, with universal newlines."""
    with file.open() as f:
        data = io.BytesIO(f.read())
    try:
        encoding, _ = tokenize.detect_encoding(data.readline)
        data.seek(0)
        text = io.TextIOWrapper(data, encoding).read()
        text.encode()
    except (SyntaxError, UnicodeError, LookupError) as error:
        _log.warning("%s: skipped, not decodable as Python source (%s)", file.path, error)
        return
    yield Document(file.name, text)


def _read_python_prose(file: SourceFile, source: Source) -> Iterator[Document]:
    for document in _read_python(file, source):
        try:
            yield Document(document.key, "\n\n".join(prose(document.text)))
        except (SyntaxError, ValueError) as error:
            _log.warning("%s: skipped, not Python source of this interpreter (%s)", file.path, error)


def _read_python_docstrings(file: SourceFile, source: Source) -> Iterator[Document]:
    """Each docstring, with the package or module at the top of its file's path; equal ones never part."""
    package = file.name.split("/")[0].removesuffix(".py")
    for document in _read_python(file, source):
        try:
            for text in docstrings(document.text):
                yield Document(text, text, package)
        except (SyntaxError, ValueError) as error:
            _log.warning("%s: skipped, not Python source of this interpreter (%s)", file.path, error)


def _read_text(file: SourceFile, source: Source) -> Iterator[Document]:
    if source.config.split_by == "file":
        with file.open() as f:
            data = f.read()
        try:
            yield Document(file.name, data.decode())
        except UnicodeDecodeError as error:
            number = data.count(b"\n", 0, error.start) + 1
            raise UserError(f"{file.path}:{number}: not UTF-8: convert the file, for example with iconv") from error
        return
    paragraph: list[str] = []
    for _, line in _lines(file):
        if source.config.split_by == "line":
            yield Document(line, line)
        elif line.strip():
            paragraph.append(line)
        elif paragraph:
            text = "\n".join(paragraph)
            yield Document(text, text)
            paragraph = []
    if paragraph:
        text = "\n".join(paragraph)
        yield Document(text, text)


def _read_jsonl(file: SourceFile, source: Source) -> Iterator[Document]:
    for number, line in _lines(file):
        if line.strip():
            text, label = _json_text(line, source, f"{file.path}:{number}", "mend or delete the line")
            yield Document(text, text, label)


def _read_parquet(file: SourceFile, source: Source) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    column = source.config.text_field
    with file.open() as f:
        try:
            table = pq.ParquetFile(f)
            if column not in table.schema_arrow.names:
                hint = nearest(column, table.schema_arrow.names)
                raise UserError(f"{source.where}.text_field: {file.path} has no column {column!r}; {hint}")
            kind = table.schema_arrow.field(column).type
            if pa.types.is_dictionary(kind):
                kind = kind.value_type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
                message = f"{source.where}.text_field: column {column!r} of {file.path} holds {kind}, not strings"
                raise UserError(f"{message}: name the column of the text")
            labelled = source.config.label_field in table.schema_arrow.names
            columns = [column, source.config.label_field] if labelled else [column]
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                texts = batch.column(column).to_pylist()
                labels = batch.column(source.config.label_field).to_pylist() if labelled else [""] * len(texts)
                for text, label in zip(texts, labels, strict=True):
                    if text is not None:  # a null is no document, as an empty string is none
                        yield Document(text, text, str(label))
        except (pa.ArrowException, UnicodeDecodeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{file.path}: not a whole Parquet file ({reason}): write or copy it again") from error


def _read_array_record(file: SourceFile, source: Source) -> Iterator[Document]:
    if isinstance(file.filesystem, _local_filesystem()):
        yield from _read_local_array_record(file.path, file, source)
        return
    # The reader seeks in a local file; a remote one is fetched once, for the one pass that is made over it.
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "records")
        with file.open() as remote, open(path, "wb") as local:
            while block := remote.read(2**22):
                local.write(block)
        yield from _read_local_array_record(path, file, source)


def _read_local_array_record(path: str, file: SourceFile, source: Source) -> Iterator[Document]:
    from array_record.python import array_record_module

    reader = array_record_module.ArrayRecordReader(path)
    try:
        count = reader.num_records()
        if not reader.ok() or not count:
            raise UserError(f"{file.path}: holds no record: not an ArrayRecord file, or cut short; write it again")
        for start in range(0, count, 256):
            for number, record in enumerate(reader.read(start, min(start + 256, count)), start):
                place = f"{file.path}: record {number}"
                try:
                    text = record.decode()
                except UnicodeDecodeError as error:
                    raise UserError(f"{place} is not UTF-8: write records as UTF-8 text or JSON") from error
                label = ""
                if source.config.text_field:
                    mend = f"write JSON objects, or set {source.where}.text_field='' if records are plain text"
                    text, label = _json_text(text, source, place, mend)
                yield Document(text, text, label)
    except (IndexError, RuntimeError) as error:
        raise UserError(f"{file.path}: cannot be read as ArrayRecord ({error}): write it again") from error
    finally:
        with contextlib.suppress(RuntimeError):  # closing tells of a damaged file once more
            reader.close()


def _local_filesystem() -> type:
    from fsspec.implementations.local import LocalFileSystem

    return LocalFileSystem


def _lines(file: SourceFile) -> Iterator[tuple[int, str]]:
    """Yields ``(line number, line without its newline)``, streaming; a byte-order mark is dropped."""
    with file.open() as f:
        for number, line in enumerate(f, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{file.path}:{number}: not UTF-8: convert the file, for example with iconv") from error
            yield number, text.rstrip("\r\n")


def _json_text(record: str, source: Source, place: str, mend: str) -> tuple[str, str]:
    """Text and label of one JSON object, the label empty where it has none; ``place`` and ``mend`` make the message."""
    try:
        value: Any = json.loads(record)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not valid JSON ({error}): {mend}") from error
    field = source.config.text_field
    if not isinstance(value, dict):
        raise UserError(f"{place}: a JSON {type(value).__name__}, not an object: {mend}")
    if field not in value:
        hint = nearest(field, value) if value else "the object is empty"
        raise UserError(f"{place}: no key {field!r} ({source.where}.text_field); {hint}")
    text = value[field]
    if not isinstance(text, str):
        raise UserError(f"{place}: {field!r} holds {type(text).__name__}, not a string: {mend}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: {field!r} holds half of a surrogate pair (\\ud800..\\udfff): {mend}") from error
    return text, str(value.get(source.config.label_field, ""))


_Reader = Callable[[SourceFile, Source], Iterator[Document]]
_READERS: dict[str, tuple[tuple[str, ...], _Reader]] = {
    "python_source": ((".py",), _read_python),
    "python_prose": ((".py",), _read_python_prose),
    "python_docstrings": ((".py",), _read_python_docstrings),
    "text": (_TEXT_SUFFIXES, _read_text),
    "jsonl": ((".jsonl",), _read_jsonl),
    "parquet": ((".parquet",), _read_parquet),
    "array_record": ((".array_record", ".arrayrecord"), _read_array_record),
}
