"""Batches together with a glimpse of the one that follows, for steps that begin the next one's work."""

from collections.abc import Iterator, Sequence
from typing import Any

from ml.data.pipeline import Loader
from ml.data.prepared import Batch


def next_name(name: str) -> str:
    """What an array of the following batch is called."""
    return f"next_{name}"


class Lookahead(Iterator[Batch]):
    """A loader whose batches hold some arrays of the following one besides; it is resumed as the loader is.

    Args:
      loader: gives the batches.
      names: of the arrays.
    """

    def __init__(self, loader: Loader, names: Sequence[str]):
        self._loader, self._names = loader, names
        self._following: Batch | None = None
        self._state = loader.get_state()

    def __next__(self) -> Batch:
        """The next batch, and arrays of the one after it."""
        batch = next(self._loader) if self._following is None else self._following
        self._state = self._loader.get_state()
        self._following = next(self._loader)
        return batch | {next_name(name): self._following[name] for name in self._names}

    def get_state(self) -> dict[str, Any]:
        """The position behind the last batch that was given, as `Loader.get_state` has it."""
        return self._state

    def set_state(self, state: dict[str, Any]) -> None:
        """See `Loader.set_state`."""
        self._loader.set_state(state)
        self._following, self._state = None, self._loader.get_state()

    def close(self) -> None:
        """See `Loader.close`."""
        self._loader.close()
