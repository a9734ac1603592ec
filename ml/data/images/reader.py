"""Reads numbered images into batches: decoded, cut, turned; a pure function of the numbers."""

import dataclasses
import logging
import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from ml.data.images.config import CropConfig, ImageDataConfig
from ml.data.prepared import Batch
from ml.errors import UserError

_log = logging.getLogger(__name__)

# Broken images in a row after which something else must be wrong.
_TRIES = 64
# Draws of a random part before the middle is taken, as everywhere.
_CROP_TRIES = 10
# What Pillow raises for files that are no images, are cut short, or are damaged.
_BROKEN = (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError)

# Left, top, right and bottom, in pixels.
Box = tuple[float, float, float, float]

_MODES = {1: "L", 3: "RGB"}


def empty_images(rows: int, config: ImageDataConfig) -> Batch:
    """A batch of padding, every array zero.

    Returns:
      ``images`` uint8 ``[rows, size, size, channels]``; and ``[rows, 1]``: int32 ``targets``, the labels; float32
      ``loss_mask``, 1 but for padding; float32 ``broken``, how many images were broken that should have stood here.
    """
    size = config.image_size
    ones = {name: np.zeros((rows, 1), np.float32) for name in ("loss_mask", "broken")}
    images = np.zeros((rows, size, size, config.channels), np.uint8)
    return {"images": images, "targets": np.zeros((rows, 1), np.int32), **ones}


@dataclasses.dataclass(frozen=True)
class ImageReader:
    """Reads images of several stores.

    A broken image is named once in the log. In training the next one that is whole stands in its place, so that a batch
    stays full and the same on every start; in evaluation its row is padding.

    Attributes:
      stores: together one long list of images.
      config: how they are cut.
      seed: of what is drawn; ``None``: evaluation.
    """

    stores: Sequence[Any]
    config: ImageDataConfig
    seed: int | None
    _named: set[str] = dataclasses.field(default_factory=set, compare=False)

    def __call__(self, numbers: Int[np.ndarray, "batch"]) -> Batch:
        """The batch of these numbers (`ml.data.prepared.Prepared.reader`), as `empty_images` describes it.

        Raises:
          UserError: one image after another is broken.
        """
        batch, count = empty_images(len(numbers), self.config), sum(map(len, self.stores))
        for place, number in enumerate(np.asarray(numbers).tolist()):
            if self.seed is None and number >= count:
                continue
            for row in range(number % count, number % count + (1 if self.seed is None else _TRIES)):
                store, own = self._owner(row % count)
                try:
                    encoded, label = store.read(own)
                    with encoded:
                        image = encoded.convert(_MODES[self.config.channels])
                except _BROKEN as error:
                    self._report(store.name(own), error)
                    batch["broken"][place] += 1
                    continue
                batch["images"][place] = self._pixels(image, number)
                batch["targets"][place], batch["loss_mask"][place] = label, 1.0
                break
            else:
                if self.seed is not None:
                    raise UserError(f"data: {_TRIES} images in a row are broken, the last one {store.name(own)}")
        return batch

    def _owner(self, row: int) -> tuple[Any, int]:
        for store in self.stores:
            if row < len(store):
                return store, row
            row -= len(store)
        raise AssertionError(row)

    def _pixels(self, image: Image.Image, number: int) -> UInt8[np.ndarray, "size size channels"]:
        if self.seed is None:
            pixels = whole(image, self.config)
        else:
            # Philox: a generator for each number, and no two of them alike.
            pixels = drawn(image, self.config, np.random.Generator(np.random.Philox(key=[self.seed, number])))
        return pixels.reshape(*pixels.shape[:2], -1)

    def _report(self, name: str, error: Exception) -> None:
        if name not in self._named:
            self._named.add(name)
            _log.warning("%s: broken, skipped (%s)", name, str(error) or type(error).__name__)


def whole(image: Image.Image, config: ImageDataConfig) -> np.ndarray:
    """What evaluation sees: the shorter side scaled to ``resize``, and the middle of that."""
    width, height = image.size
    side = min(width, height) * config.image_size / (config.resize or config.image_size)
    left, top = (width - side) / 2, (height - side) / 2
    return _resized(image, (left, top, left + side, top + side), config.image_size)


def drawn(image: Image.Image, config: ImageDataConfig, rng: np.random.Generator) -> np.ndarray:
    """What training sees of an image this time."""
    crop = config.crop
    if crop.kind == "resized":
        pixels = _resized(image, random_box(image.size, crop, rng), config.image_size)
    else:
        pixels = whole(image, config)
        if crop.kind == "shift":
            pixels = _shifted(pixels, *rng.integers(-crop.max_shift, crop.max_shift, size=2, endpoint=True))
    return pixels[:, ::-1] if crop.flip and rng.random() < 0.5 else pixels


def random_box(size: tuple[int, int], crop: CropConfig, rng: np.random.Generator) -> Box:
    """A part of random area and aspect ratio (its logarithm uniform), as left, top, right and bottom.

    Where none fits in ten draws, the middle, as wide or high as the aspect ratios allow.
    """
    width, height = size
    widest = math.log(crop.max_aspect)
    for _ in range(_CROP_TRIES):
        area = width * height * rng.uniform(crop.min_area, 1.0)
        aspect = math.exp(rng.uniform(-widest, widest))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            return left, top, left + w, top + h
    wide, high = min(width, height * crop.max_aspect), min(height, width * crop.max_aspect)
    return (width - wide) / 2, (height - high) / 2, (width + wide) / 2, (height + high) / 2


def _resized(image: Image.Image, box: Box, size: int) -> np.ndarray:
    if box == (0, 0, size, size) and image.size == (size, size):
        return np.asarray(image)
    # reducing_gap decodes a JPEG no finer than needed for the result.
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=3.0))


def _shifted(pixels: np.ndarray, down: int, right: int) -> np.ndarray:
    moved = np.zeros_like(pixels)
    height, width = pixels.shape[:2]
    moved[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = pixels[
        max(-down, 0) : height + min(-down, 0), max(-right, 0) : width + min(-right, 0)
    ]
    return moved
