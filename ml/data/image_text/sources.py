"""Files that pair images with captions, read one pair after another; images themselves stay where they are."""

import contextlib
import csv
import dataclasses
import io
import json
import posixpath
import tarfile
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

from ml.data.files import SourceFile, find_files, listing_fingerprint
from ml.data.image_text.config import ImageTextDataConfig, PairFormat
from ml.data.images.stores import SUFFIXES, Digits
from ml.errors import UserError

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_TEMPLATES = (
    "a photo of the digit {}.",
    "the number {}.",
    "a handwritten {}.",
    "someone wrote a {} here.",
    "this is a small picture of a {}.",
)
_SUFFIXES: Mapping[PairFormat, tuple[str, ...]] = {
    "jsonl": (".jsonl", ".jsonl.gz"),
    "csv": (".csv", ".tsv", ".csv.gz", ".tsv.gz"),
    "webdataset": (".tar",),
}


@dataclasses.dataclass(frozen=True)
class Pair:
    """An image and what is said of it.

    Attributes:
      key: the same wherever the files lie; by it a pair is held out or not.
      path: of the file that the image is in; relative to the folder of prepared data if it lies there.
      offset, size: where in it; a size of -1 is the whole file.
      captions: at least one.
    """

    key: str
    path: str
    offset: int
    size: int
    captions: tuple[str, ...]


class PairSource:
    """The pairs of a configuration.

    Attributes:
      fingerprint: changes when any of its files does.
      name: for reports.
    """

    def __init__(self, config: ImageTextDataConfig, where: str):
        """Lists the files.

        Raises:
          UserError: there are none.
        """
        self.config = config
        self.name = f"{config.format}:{config.path or 'scikit-learn'}"
        self._where = f"{where}.path"
        self._files: tuple[SourceFile, ...] = ()
        if config.format != "digits":
            self._files = find_files(config.path, _SUFFIXES[config.format], self._where)
        fields = (config.format, config.image_field, config.caption_field, config.path)
        self.fingerprint = repr((fields, listing_fingerprint(self._files)))

    def pairs(self, folder: Path | None) -> Generator[Pair]:
        """All pairs, in order.

        Args:
          folder: for images that are in no file yet; ``None``: only captions are wanted.

        Raises:
          UserError: a malformed line, table or archive (file and line named).
        """
        if self.config.format == "digits":
            yield from _digits(folder)
            return
        read = _READERS[self.config.format]
        for file in self._files:
            yield from read(file, self.config)


def _digits(folder: Path | None) -> Generator[Pair]:
    """Scikit-learn's digits as PNG files, one behind another in one file."""
    digits, name, offset = Digits(), "digits.bin", 0
    with contextlib.nullcontext() if folder is None else (folder / name).open("wb") as file:
        for row in range(len(digits)):
            image, label = digits.read(row)
            png = io.BytesIO()
            image.save(png, "PNG")
            if file is not None:
                file.write(png.getvalue())
            captions = tuple(template.format(DIGIT_NAMES[label]) for template in DIGIT_TEMPLATES)
            # The store's name for it: what is held out here is held out where digits are classified too.
            yield Pair(digits.name(row), name, offset, len(png.getvalue()), captions)
            offset += len(png.getvalue())


def _jsonl(file: SourceFile, config: ImageTextDataConfig) -> Generator[Pair]:
    with file.open() as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{file.path}:{number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{where}: malformed JSON ({error}); mend or remove the line") from None
            yield _listed(record, file, config, where)


def _csv(file: SourceFile, config: ImageTextDataConfig) -> Generator[Pair]:
    delimiter = "\t" if ".tsv" in posixpath.basename(file.name) else ","
    with file.open() as data:
        rows = csv.DictReader(io.TextIOWrapper(data, "utf-8-sig", newline=""), delimiter=delimiter)
        for row in rows:
            yield _listed(row, file, config, f"{file.path}:{rows.line_num}")


def _listed(record: Any, file: SourceFile, config: ImageTextDataConfig, where: str) -> Pair:
    """The pair of a line in a JSONL file or a table."""
    fields = (config.image_field, config.caption_field)
    if not isinstance(record, dict) or any(record.get(field) is None for field in fields):
        raise UserError(f"{where}: has no {' and '.join(map(repr, fields))}; set image_field and caption_field")
    image, captions = (record[field] for field in fields)
    captions = captions if isinstance(captions, list) else [captions]
    if not isinstance(image, str) or not captions or not all(isinstance(caption, str) for caption in captions):
        raise UserError(f"{where}: the image must be a path, and the caption a text or a list of texts")
    path = image if "://" in image else _located(file, posixpath.join(posixpath.dirname(file.path), image))
    return Pair(image, path, 0, -1, tuple(captions))


def _located(file: SourceFile, path: str) -> str:
    """A path of the file system that ``file`` is in: as it is on a local disk, else as a URL."""
    url = file.filesystem.unstrip_protocol(path)
    return path if url.startswith(("file:", "local:")) else url


def _webdataset(file: SourceFile, config: ImageTextDataConfig) -> Generator[Pair]:
    """Pairs of a tar file (github.com/webdataset/webdataset): members that follow one another and share their name."""
    if not file.name.endswith(".tar"):
        raise UserError(f"{file.path}: images are read from their place in a tar file, so it must not be compressed")
    try:
        with file.open() as data, tarfile.open(fileobj=data) as archive:
            key, image = "", None
            captions: tuple[str, ...] = ()
            for member in archive:
                if not member.isfile():
                    continue
                # A name ends at the first dot behind its folder.
                folder, base = posixpath.split(member.name)
                stem, _, extension = base.partition(".")
                if (name := posixpath.join(folder, stem)) != key:
                    if image and captions:
                        yield Pair(f"{file.name}:{key}", _located(file, file.path), *image, captions)
                    key, image, captions = name, None, ()
                if f".{extension.lower()}" in SUFFIXES:
                    image = member.offset_data, member.size
                elif extension in ("txt", "json"):
                    content = archive.extractfile(member)
                    assert content is not None  # it is a file
                    captions = captions or _captions(content.read(), extension, config, f"{file.path}: {member.name}")
            if image and captions:
                yield Pair(f"{file.name}:{key}", _located(file, file.path), *image, captions)
    except tarfile.TarError as error:
        raise UserError(f"{file.path}: is no whole tar file ({error}); copy it again or remove it") from None


def _captions(content: bytes, extension: str, config: ImageTextDataConfig, where: str) -> tuple[str, ...]:
    text = content.decode("utf-8", "replace").strip()
    if extension == "txt":
        return (text,) if text else ()
    try:
        found = json.loads(text).get(config.caption_field, ())
    except (ValueError, AttributeError) as error:
        raise UserError(f"{where}: is no JSON object ({error})") from None
    return tuple(map(str, found)) if isinstance(found, list) else (str(found),) if found else ()


_READERS: Mapping[str, Callable[[SourceFile, ImageTextDataConfig], Generator[Pair]]] = {
    "jsonl": _jsonl,
    "csv": _csv,
    "webdataset": _webdataset,
}
