"""Where images lie: scikit-learn's digits, folders of class folders, ArrayRecord files; each a numbered list."""

import abc
import glob
import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ml.data.images.examples import read_example
from ml.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")
_LABELS = ("label.labels.txt", "classes.txt")


class ImageStore(abc.ABC):
    """Labelled images by number. Pickles small, since worker processes get a copy.

    Attributes:
      digest: a hash of what there is (names and labels, not pixels).
      classes: their names, by label.
    """

    digest: str
    classes: tuple[str, ...]

    @abc.abstractmethod
    def __len__(self) -> int:
        """How many images there are."""

    @abc.abstractmethod
    def name(self, row: int) -> str:
        """What to call an image in messages; it also decides on which side it is."""

    @abc.abstractmethod
    def read(self, row: int) -> tuple[Image.Image, int]:
        """An image, decoded no further than its header, and its label; raises whatever a broken one raises."""


class Digits(ImageStore):
    """Scikit-learn's handwritten digits (a part of UCI's set), 8x8 pixels of 17 greys.

    Raises:
      UserError: scikit-learn is not installed.
    """

    def __init__(self):
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise UserError(
                "config.data.source=digits: needs scikit-learn; run pip install scikit-learn, or read images of your "
                "own with source=folder"
            ) from None
        data = load_digits()
        self._pixels = np.round(data.images * (255 / 16)).astype(np.uint8)
        self._labels = data.target.astype(np.int64)
        self.classes = tuple(map(str, range(10)))
        self.digest = hashlib.blake2b(self._pixels.tobytes() + self._labels.tobytes(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self._labels)

    def name(self, row: int) -> str:
        return f"digit {row}"

    def read(self, row: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self._pixels[row]), int(self._labels[row])


class Folder(ImageStore):
    """A folder of class folders, the classes in the order of their names; images may lie deeper within.

    Args:
      path: the folder.
      where: the name of ``path`` in messages.
      classes: those of the training images; ``None``: these are they.

    Raises:
      UserError: no such folder, no class in it, no image, or a class that is not in ``classes``.
    """

    def __init__(self, path: str, where: str, classes: Sequence[str] | None = None):
        self._root = Path(path).expanduser()
        if not self._root.is_dir():
            what = "is a file" if self._root.exists() else "does not exist"
            raise UserError(f"{where}={path}: {what}; give a folder that holds a folder for each class")
        found = sorted(e.name for e in os.scandir(self._root) if e.is_dir() and not e.name.startswith("."))
        if not found:
            raise UserError(
                f"{where}={path}: holds no class folders; put the images of each class into a folder of its own "
                "(class/image.jpg)"
            )
        if classes is not None and (unknown := sorted(set(found) - set(classes))):
            raise UserError(f"{where}={path}: class {unknown[0]!r} is not among the training images; remove its folder")
        self.classes = tuple(found if classes is None else classes)
        names, labels = [], []
        for label in found:
            images = sorted(_images_below(self._root / label, label))
            names += images
            labels += [self.classes.index(label)] * len(images)
        if not names:
            raise UserError(f"{where}={path}: its {len(found)} class folders hold no image ({', '.join(SUFFIXES)})")
        self._names = np.array([os.fsencode(name) for name in names])  # a million paths as one array, not as objects
        self._labels = np.array(labels)
        self.digest = hashlib.blake2b(self._names.tobytes() + self._labels.tobytes(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self._labels)

    def name(self, row: int) -> str:
        return os.fsdecode(self._names[row])

    def read(self, row: int) -> tuple[Image.Image, int]:
        return Image.open(self._root / self.name(row)), int(self._labels[row])


class ArrayRecords(ImageStore):
    """ArrayRecord files of ``tf.train.Example``.

    Args:
      path: a file, a folder or a glob.
      where: the name of ``path`` in messages.
      classes: those of the training images; ``None``: they stand in ``label.labels.txt`` beside the files.

    Raises:
      UserError: no such files, a file that is none, or no list of classes.
    """

    def __init__(self, path: str, where: str, classes: Sequence[str] | None = None):
        given = Path(path).expanduser()
        pattern = str(given / "*.array_record*") if given.is_dir() else str(given)
        self._files = sorted(file for file in glob.glob(pattern, recursive=True) if os.path.isfile(file))
        if not self._files:
            raise UserError(f"{where}={path}: no such file; give a file, folder or glob of ArrayRecord files")
        self.classes = tuple(_listed_classes(self._files[0], where) if classes is None else classes)
        sizes = [(os.path.basename(file), os.path.getsize(file)) for file in self._files]
        self.digest = hashlib.blake2b(repr((sizes, self.classes)).encode(), digest_size=16).hexdigest()
        self._reader: Any = None
        try:
            self._count = len(self._source)
        except Exception as error:  # the reader has no error of its own
            raise UserError(
                f"{where}={path}: not ArrayRecord files, or cut short ({error}); write them again"
            ) from None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reader": None}

    @property
    def _source(self) -> Any:
        if self._reader is None:
            from array_record.python.array_record_data_source import ArrayRecordDataSource

            self._reader = ArrayRecordDataSource(self._files)
        return self._reader

    def __len__(self) -> int:
        return self._count

    def name(self, row: int) -> str:
        return f"record {row} of {os.path.dirname(self._files[0])}"

    def read(self, row: int) -> tuple[Image.Image, int]:
        example = read_example(self._source[row])
        (image,), (label,) = example["image"], example["label"]
        if not isinstance(image, bytes) or not isinstance(label, int) or not 0 <= label < len(self.classes):
            raise ValueError(f"label {label} is none of the {len(self.classes)} classes, or the image is not bytes")
        return Image.open(io.BytesIO(image)), label


def open_store(source: str, path: str, where: str, classes: Sequence[str] | None = None) -> ImageStore:
    """The images of this kind of source (`ImageDataConfig.source`)."""
    if source == "digits":
        return Digits()
    return {"folder": Folder, "array_record": ArrayRecords}[source](path, where, classes)


def _images_below(folder: Path, prefix: str) -> list[str]:
    names = []
    for entry in os.scandir(folder):
        if entry.is_dir():
            names += _images_below(Path(entry.path), f"{prefix}/{entry.name}")
        elif entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith("."):
            names.append(f"{prefix}/{entry.name}")
    return names


def _listed_classes(file: str, where: str) -> list[str]:
    for name in _LABELS:
        listed = Path(file).with_name(name)
        if listed.is_file():
            return [line.strip() for line in listed.read_text().splitlines() if line.strip()]
    raise UserError(f"{where}: {Path(file).parent} lacks {_LABELS[0]}; write the classes there, one a line, by label")
