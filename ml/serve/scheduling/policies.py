"""In which order waiting sequences are admitted: the seam between the scheduler and its policies."""

from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from typing import Any

from ml.serve.scheduling.request import Sequence

# Sequences that one step looks at, so that a long queue does not slow it down.
WINDOW = 512


class Fifo:
    """By priority, then in the order of arrival. Other policies override what they do otherwise."""

    def rank(self, sequence: Sequence, number: int) -> tuple[Any, ...]:
        """The sequence's place among all, no two alike: smaller is admitted first, and preempted last.

        Args:
          sequence: a new one.
          number: counts requests in the order in which they were added.
        """
        return (sequence.request.priority, sequence.request.arrival, number, sequence.index)

    def order(self, waiting: SequenceOf[Sequence], cached: Callable[[Sequence], int], now: int) -> Iterable[Sequence]:
        """The sequences to admit, the first one first. Those behind one that finds no room have to wait.

        Args:
          waiting: by rank.
          cached: tokens of a sequence that are in the cache.
          now: the number of the step.
        """
        return waiting[:WINDOW]

    def publishable(self, sequence: Sequence) -> int | None:
        """Leading tokens that others may want while it runs; ``None``: all."""
        return None

    def end(self, sequence: Sequence) -> int | None:
        """Hears that a sequence has ended; returns how many of its leading tokens are worth keeping; ``None``: all."""
        return None


class LongestPrefix(Fifo):
    """Those with the most cached tokens first: they cost least, and use the cache before it is evicted."""

    def __init__(self, patience: int = 256):
        """After ``patience`` steps a sequence goes first, however little of it is cached."""
        self.patience = patience

    def order(self, waiting: SequenceOf[Sequence], cached: Callable[[Sequence], int], now: int) -> Iterable[Sequence]:
        """See `Fifo.order`."""
        overdue = [s for s in waiting[:WINDOW] if now - s.waiting_since > self.patience]
        others = [s for s in waiting[:WINDOW] if now - s.waiting_since <= self.patience]
        return overdue + sorted(others, key=lambda s: -cached(s))
