"""Which code makes which kind of data ready, by the class of its configuration."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

from ml.data import image_text, images
from ml.data.config import DataConfig
from ml.data.prepare import padding as text_padding
from ml.data.prepare import prepare as prepare_text
from ml.data.prepared import Batch, Prepared


@dataclasses.dataclass(frozen=True)
class _Kind:
    prepare: Callable[..., Prepared]
    padding: Callable[[Any, int], Batch]


_KINDS: Mapping[type, _Kind] = {
    DataConfig: _Kind(prepare_text, text_padding),
    images.ImageDataConfig: _Kind(images.prepare, images.padding),
    image_text.ImageTextDataConfig: _Kind(image_text.prepare, image_text.padding),
}


def prepare(config: Any, workdir: str | os.PathLike[str], *, where: str = "data") -> Prepared:
    """Makes data ready to be read, or finds it ready from an earlier call; see the kinds' own ``prepare``.

    Args:
      config: of one of the kinds.
      workdir: of the run; what is kept lies in it unless ``config`` says otherwise.
      where: the name of ``config`` in messages.

    Raises:
      UserError: something is missing, malformed or empty.
    """
    return _KINDS[type(config)].prepare(config, workdir, where=where)


def padding(config: Any, rows: int) -> Batch:
    """A batch of nothing, with the arrays that batches of ``config`` have."""
    return _KINDS[type(config)].padding(config, rows)
