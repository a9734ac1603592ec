"""Images with captions: what to read, and how to cut it into rows, as data."""

import dataclasses
from typing import Literal

from ml.data.config import TokenizerConfig
from ml.data.images.config import CropConfig

PairFormat = Literal["digits", "jsonl", "csv", "webdataset"]


@dataclasses.dataclass(frozen=True)
class ImageTextDataConfig:
    """Pairs of an image and a caption, for a two-tower model.

    Attributes:
      format: ``digits``: scikit-learn's, captioned by sentences with their names; ``jsonl``: a JSON object a line;
        ``csv``: a table with a header (``.tsv``: split at tabs); ``webdataset``: tar files in which members of one name
        are a pair, such as ``0017.jpg`` and ``0017.txt`` (or ``.json``).
      path: the file, a folder or a glob of such files; empty for ``digits`` only.
      image_field: the key or column with the image's path, relative to the file that names it.
      caption_field: the key or column with the caption; of JSON it may be a list, of which each epoch draws one.
      image_size, resize, channels, crop: of images, see `ml.data.images.ImageDataConfig`.
      text_length: tokens of a row.
      tokenizer: trained on the training captions if it names no path.
      heldout_fraction: share of the pairs, chosen by a hash of their image's name, kept for evaluation only.
      cache_dir: where tokenized captions are kept between runs; empty means ``data/`` in the work directory.
      num_workers: processes that decode images; 0 means threads of the training process.
      kind: tells this data from others.
    """

    format: PairFormat = "digits"
    path: str = ""
    image_field: str = "image"
    caption_field: str = "caption"
    image_size: int = 224
    resize: int = 0
    channels: Literal[1, 3] = 3
    crop: CropConfig = CropConfig()
    text_length: int = 77
    tokenizer: TokenizerConfig = TokenizerConfig()
    heldout_fraction: float = 0.02
    cache_dir: str = ""
    num_workers: int = 0
    kind: Literal["image_text"] = "image_text"

    def __post_init__(self):
        if bool(self.path) == (self.format == "digits"):
            mend = "leave it empty" if self.path else "name a file, a folder or a glob"
            raise ValueError(f"path={self.path!r} with format={self.format!r}: {mend}")
        if self.image_size < 1 or (self.resize and self.resize < self.image_size):
            raise ValueError(f"need image_size={self.image_size} >= 1 and resize={self.resize} at least as large, or 0")
        if self.text_length < 3:
            raise ValueError(f"text_length={self.text_length} must be at least 3: a token, and what closes it in")
        if not 0 <= self.heldout_fraction < 1:
            raise ValueError(f"heldout_fraction={self.heldout_fraction} must lie in [0, 1)")
        if self.num_workers < 0:
            raise ValueError(f"num_workers={self.num_workers} must not be negative")
