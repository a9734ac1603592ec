"""From configuration to pairs of images and captions that can be read by number: captions tokenized, once."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from ml.data.cache import build_once
from ml.data.image_text.captions import caption_ids, caption_rows
from ml.data.image_text.config import ImageTextDataConfig
from ml.data.image_text.sources import PairSource
from ml.data.image_text.stores import PairStore, PairWriter
from ml.data.images.reader import ImageReader, empty_images
from ml.data.prepared import Batch, Prepared, PreparedSource
from ml.data.sources import is_heldout
from ml.data.tokenizer import Tokenizer
from ml.errors import UserError

_log = logging.getLogger(__name__)

# Part of every fingerprint: raise it when the files' layout or the way they are made changes.
_FORMAT = 1
_GROUP = 4096


@dataclasses.dataclass(frozen=True)
class PreparedPairs(Prepared):
    """Images with captions."""

    config: ImageTextDataConfig
    sources: tuple[PreparedSource, ...]
    tokenizer: Tokenizer

    @property
    def drawn(self) -> Any:
        """Parts of images, and which of its captions an image has."""
        names = ("image_size", "resize", "channels", "text_length")
        return {name: getattr(self.config, name) for name in names} | dataclasses.asdict(self.config.crop)

    def reader(self, stores: Sequence[Any], seed: int | None) -> Callable[[np.ndarray], Batch]:
        """Pairs, images cut and captions chosen by ``seed``."""
        return PairReader(stores, self.config, seed, self.tokenizer.eos_id)

    def save(self, folder: Path) -> None:
        """Keeps the tokenizer."""
        self.tokenizer.save(folder)


@dataclasses.dataclass(frozen=True)
class PairReader:
    """Reads numbered pairs into batches.

    Attributes:
      stores: of pairs, one.
      config: how images are cut, and how long texts are.
      seed: of what is drawn; ``None``: evaluation, which takes the first caption.
      padding: the id behind a caption.
    """

    stores: Sequence[PairStore]
    config: ImageTextDataConfig
    seed: int | None
    padding: int

    def __call__(self, numbers: Int[np.ndarray, "batch"]) -> Batch:
        """The batch of these numbers (`ml.data.prepared.Prepared.reader`), as `padding` describes it."""
        (store,) = self.stores
        batch = self._images(numbers)
        rows, real = batch.pop("targets")[:, 0].tolist(), batch["loss_mask"][:, 0].tolist()
        chosen: list[Any] = []
        for number, row, counted in zip(np.asarray(numbers).tolist(), rows, real, strict=True):
            captions: Any = store.captions(row) if counted else [[self.padding]]
            if self.seed is not None and len(captions) > 1:
                # Another key than that of the image's generator (`ml.data.images.reader`).
                rng = np.random.Generator(np.random.Philox(key=[self.seed, number], counter=[0, 0, 0, 1]))
                captions = [captions[int(rng.integers(len(captions)))]]
            chosen.append(captions[0])
        return batch | caption_rows(chosen, self.config.text_length, self.padding)

    @functools.cached_property
    def _images(self) -> ImageReader:
        # A store of pairs gives a pair's own number as its image's label: a broken image's place is taken by another.
        return ImageReader(self.stores, self.config, self.seed)  # type: ignore[arg-type]


def prepare(config: ImageTextDataConfig, workdir: str | os.PathLike[str], *, where: str = "data") -> PreparedPairs:
    """Tokenizes the captions and notes where each image lies, or finds that done; no image is decoded.

    Args:
      config: what to read.
      workdir: the cache is ``workdir/data`` unless ``config.cache_dir`` names another.
      where: the name of ``config`` in messages.

    Raises:
      UserError: a missing or malformed file, or nothing left to train on or to hold out.
    """
    cache = Path(config.cache_dir or Path(workdir) / "data").expanduser()
    source = PairSource(config, where)
    tokenizer = _tokenizer(config, source, cache, where)
    key = _key("pairs", source.fingerprint, tokenizer.fingerprint, config.heldout_fraction, config.text_length)

    def build(folder: Path) -> None:
        counts = _write(config, source, tokenizer, folder)
        _log.info("%s: %d pairs to train on, %d held out", source.name, *counts)

    folder = build_once(cache / f"pairs-{key}", build)
    train, heldout = PairStore(folder / "train"), PairStore(folder / "heldout")
    if not len(train) or (config.heldout_fraction and not len(heldout)):
        raise UserError(
            f"{where}.heldout_fraction={config.heldout_fraction} leaves {len(train)} pairs to train on and "
            f"{len(heldout)} to evaluate: choose another"
        )
    return PreparedPairs(config, (PreparedSource(source.name, 1.0, train, heldout),), tokenizer)


def padding(config: ImageTextDataConfig, rows: int) -> Batch:
    """A batch of nothing, with the arrays that batches of ``config`` have.

    Returns:
      ``images``, ``loss_mask`` and ``broken`` of `ml.data.images.reader.empty_images`; int32 ``[rows, text_length]``:
      ``tokens``; ``segment_ids``, 1 where there is text.
    """
    batch = empty_images(rows, config)  # type: ignore[arg-type]
    del batch["targets"]
    return batch | caption_rows([[]] * rows, config.text_length, 0)


def _tokenizer(config: ImageTextDataConfig, source: PairSource, cache: Path, where: str) -> Tokenizer:
    """Loads the configured tokenizer, or trains one on the training captions and keeps it in the cache."""
    settings = config.tokenizer
    if settings.path:
        return Tokenizer.load(settings.path, f"{where}.tokenizer.path")

    def train(folder: Path) -> None:
        with contextlib.closing(source.pairs(None)) as pairs:
            texts = (c for pair in pairs if not is_heldout(pair.key, config.heldout_fraction) for c in pair.captions)
            Tokenizer.train(_up_to(texts, settings.sample_bytes), settings.vocab_size).save(folder)

    key = _key("tokenizer", source.fingerprint, config.heldout_fraction, settings.vocab_size, settings.sample_bytes)
    return Tokenizer.load(build_once(cache / f"tokenizer-{key}", train))


def _up_to(texts: Any, sample_bytes: int) -> Any:
    for text in texts:
        yield text
        sample_bytes -= len(text.encode())
        if sample_bytes <= 0:
            return


def _write(config: ImageTextDataConfig, source: PairSource, tokenizer: Tokenizer, folder: Path) -> tuple[int, int]:
    with contextlib.ExitStack() as stack:
        sides = [
            stack.enter_context(contextlib.closing(PairWriter(folder / side, tokenizer.vocab_size)))
            for side in ("train", "heldout")
        ]
        pairs = stack.enter_context(contextlib.closing(source.pairs(folder)))
        while group := list(itertools.islice(pairs, _GROUP)):
            texts = [caption for pair in group for caption in pair.captions]
            ids = iter(caption_ids(tokenizer, texts, config.text_length))
            for pair in group:
                side = sides[is_heldout(pair.key, config.heldout_fraction)]
                side.add(pair, [next(ids) for _ in pair.captions])
        train, heldout = (side.finish()["pairs"] for side in sides)
    return train, heldout


def _key(*parts: object) -> str:
    return hashlib.blake2b(repr((_FORMAT, *parts)).encode(), digest_size=12).hexdigest()
