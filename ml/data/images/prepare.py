"""From configuration to labelled images that can be read by number: listed, and split into two sides."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image

from ml.data.images.config import ImageDataConfig
from ml.data.images.reader import ImageReader, empty_images
from ml.data.images.stores import ImageStore, open_store
from ml.data.prepared import Batch, Prepared, PreparedSource
from ml.data.sources import is_heldout
from ml.errors import UserError


@dataclasses.dataclass(frozen=True)
class Part:
    """Some of a store's images, as a store.

    Attributes:
      store: all.
      rows: which.
    """

    store: ImageStore
    rows: Int[np.ndarray, "images"]

    @property
    def digest(self) -> str:
        """A hash of what there is."""
        return hashlib.blake2b(self.store.digest.encode() + self.rows.tobytes(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, row: int) -> str:
        """See `ImageStore`."""
        return self.store.name(self.rows[row])

    def read(self, row: int) -> tuple[Image.Image, int]:
        """See `ImageStore`."""
        return self.store.read(self.rows[row])


@dataclasses.dataclass(frozen=True)
class PreparedImages(Prepared):
    """Labelled images.

    Attributes:
      classes: names, by label.
    """

    config: ImageDataConfig
    sources: tuple[PreparedSource, ...]
    classes: tuple[str, ...]

    @property
    def drawn(self) -> Any:
        """Parts of images, and which are mirrored."""
        return {name: getattr(self.config, name) for name in ("image_size", "resize", "channels")} | dataclasses.asdict(
            self.config.crop
        )

    def reader(self, stores: Sequence[Any], seed: int | None) -> Callable[[np.ndarray], Batch]:
        """Images, cut at random by ``seed``."""
        return ImageReader(stores, self.config, seed)

    def save(self, folder: Path) -> None:
        """Keeps the names of the classes, as ``classes.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "classes.json").write_text(json.dumps(self.classes, indent=2) + "\n")


def prepare(config: ImageDataConfig, workdir: str | os.PathLike[str], *, where: str = "data") -> PreparedImages:
    """Lists the images; none is decoded yet.

    Args:
      config: which images.
      workdir: not used, since nothing is kept.
      where: the name of ``config`` in messages.

    Raises:
      UserError: a missing folder, one without classes or images, nothing left to train on or to hold out.
    """
    del workdir
    store = open_store(config.source, config.path, f"{where}.path")
    every = range(len(store))
    if config.heldout_path:
        train = Part(store, np.array(every))
        other = open_store(config.source, config.heldout_path, f"{where}.heldout_path", store.classes)
        heldout = Part(other, np.arange(len(other)))
    else:
        held = [is_heldout(store.name(row), config.heldout_fraction) for row in every]
        train, heldout = Part(store, np.flatnonzero(np.logical_not(held))), Part(store, np.flatnonzero(held))
        if not len(train) or (config.heldout_fraction and not len(heldout)):
            raise UserError(
                f"{where}.heldout_fraction={config.heldout_fraction} leaves {len(train)} of {len(store)} images to "
                f"train on and {len(heldout)} to evaluate: choose another, or name images in {where}.heldout_path"
            )
    source = PreparedSource(f"{config.source}:{config.path or 'scikit-learn'}", 1.0, train, heldout)
    return PreparedImages(config, (source,), store.classes)


def padding(config: ImageDataConfig, rows: int) -> Batch:
    """A batch of nothing, with the arrays that batches of ``config`` have."""
    return empty_images(rows, config)
