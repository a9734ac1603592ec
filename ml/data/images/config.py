"""Which images to read, and how to cut them, as data."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class CropConfig:
    """What part of an image is seen in training, drawn anew in each epoch.

    Attributes:
      kind: ``none``: what evaluation sees; ``shift``: that, moved by some pixels, with black where nothing is;
        ``resized``: a part of random area and aspect ratio (Szegedy et al. 2014), as ImageNet's recipes have it.
      max_shift: pixels to each side, for ``shift``.
      min_area: least share of the image's area, for ``resized``.
      max_aspect: widest aspect ratio, for ``resized``; its inverse is the narrowest.
      flip: mirror half of the images.
    """

    kind: Literal["none", "shift", "resized"] = "none"
    max_shift: int = 1
    min_area: float = 0.08
    max_aspect: float = 4 / 3
    flip: bool = False

    def __post_init__(self):
        if self.max_shift < 0:
            raise ValueError(f"max_shift={self.max_shift} must not be negative")
        if not 0 < self.min_area <= 1 or self.max_aspect < 1:
            raise ValueError(f"need min_area={self.min_area} in (0, 1] and max_aspect={self.max_aspect} >= 1")


@dataclasses.dataclass(frozen=True)
class ImageDataConfig:
    """Labelled images.

    Attributes:
      source: ``digits``: scikit-learn's 1,797 handwritten digits of 8x8 pixels; ``folder``: ImageNet's form, a folder
        for each class with its images within; ``array_record``: files of ``tf.train.Example`` records with ``image``
        (encoded) and ``label``, as TensorFlow Datasets writes them, and beside them ``label.labels.txt``, a class a
        line.
      path: of the training images: a folder of class folders; a folder, file or glob of ArrayRecord files.
      heldout_path: the same for evaluation; empty: a share of the training images.
      heldout_fraction: that share, chosen by a hash of each image's name.
      image_size: side of the images that the model sees, in pixels.
      resize: evaluation scales the shorter side to this and takes the middle of ``image_size``; 0: to ``image_size``.
      channels: 1: grey, 3: red, green, blue.
      crop: what training sees.
      num_workers: processes that decode and assemble batches; 0 means threads of the training process.
      kind: tells images from other data.
    """

    source: Literal["digits", "folder", "array_record"] = "digits"
    path: str = ""
    heldout_path: str = ""
    heldout_fraction: float = 0.2
    image_size: int = 8
    resize: int = 0
    channels: Literal[1, 3] = 1
    crop: CropConfig = CropConfig()
    num_workers: int = 0
    kind: Literal["images"] = "images"

    def __post_init__(self):
        if not self.path and self.source != "digits":
            raise ValueError(f"path is empty: give the training images of source={self.source!r}")
        if self.source == "digits" and (self.path or self.heldout_path):
            raise ValueError("source='digits' has no path: set source='folder' or 'array_record' to read images")
        if self.image_size < 1 or (self.resize and self.resize < self.image_size):
            raise ValueError(f"need image_size={self.image_size} >= 1 and resize={self.resize} at least as large, or 0")
        if not 0 <= self.heldout_fraction < 1:
            raise ValueError(f"heldout_fraction={self.heldout_fraction} must lie in [0, 1)")
        if self.num_workers < 0:
            raise ValueError(f"num_workers={self.num_workers} must not be negative")
