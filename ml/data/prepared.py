"""Data that is ready to be read, of whatever kind: what the loaders and the evaluation ask of it."""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class PreparedSource:
    """One source of rows.

    Attributes:
      name: kind and path, for reports.
      weight: share of its rows in a mixture, relative to the other sources' weights.
      train, heldout: stores of the two sides, which have a length and a ``digest`` of what is in them; ``heldout`` may
        be empty.
    """

    name: str
    weight: float
    train: Any
    heldout: Any


@dataclasses.dataclass(frozen=True)
class Prepared(abc.ABC):
    """What preparing leaves.

    Attributes:
      config: what was asked for.
      sources: of rows.
    """

    config: Any
    sources: tuple[Any, ...]

    @property
    def train_rows(self) -> int:
        """Rows of one pass over all sources."""
        return sum(len(source.train) for source in self.sources)

    @property
    def heldout_rows(self) -> int:
        """Rows of one pass over what is held out; 0: nothing is."""
        return sum(len(source.heldout) for source in self.sources)

    @property
    def drawn(self) -> Any:
        """The settings by which rows are drawn anew in each epoch, as JSON; ``None``: they are read as they are."""
        return None

    @property
    def heldout_bytes(self) -> int:
        """Bytes of the text that is held out; 0: it is no text."""
        return 0

    @property
    def codes_text(self) -> bool:
        """Whether the loss on what is held out is the length of a text's code, as that of a compressor is."""
        return False

    @abc.abstractmethod
    def reader(self, stores: Sequence[Any], seed: int | None) -> Callable[[np.ndarray], Batch]:
        """What reads numbered rows into a batch.

        Args:
          stores: together one long list of rows; numbers beyond its end give padding.
          seed: of what is drawn, where numbers are ``row + rows * epoch``; ``None``: the same in every pass.
        """

    def save(self, folder: Path) -> None:
        """Keeps in a run's folder what its model needs later on."""
        del folder
