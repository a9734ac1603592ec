"""Tokens that are guessed, fed in the same step as what is known, and kept as far as they turn out right."""

from collections.abc import Sequence as SequenceOf

from ml.serve.scheduling.draft import Draft
from ml.serve.scheduling.memory import CacheMemory
from ml.serve.scheduling.ngrams import Drafter
from ml.serve.scheduling.request import Sequence, State
from ml.serve.scheduling.statistics import Statistics
from ml.serve.scheduling.step import Row


class Speculation:
    """Adds guesses to steps, and counts a sequence's tokens as computed once they are known to be its own.

    Guesses get what nobody else wants: they push no one out of a step, and take no sequence's pages.

    Attributes:
      drafter: who guesses.
    """

    def __init__(self, most: int, drafter: Drafter, memory: CacheMemory, statistics: Statistics):
        """Guesses at most ``most`` tokens of a sequence at once; 0: no one speculates."""
        self.drafter = drafter
        self._most, self._memory, self._statistics = most, memory, statistics

    @property
    def on(self) -> bool:
        """Whether there is any."""
        return self._most > 0

    def includes(self, sequence: Sequence) -> bool:
        """Whether a sequence speculates; its last token is then always known before the next one is drawn."""
        return self.on and sequence.request.speculate and not sequence.request.token_by_token

    def add_guesses(self, draft: Draft, reserve: int) -> None:
        """Adds guesses for those that decode, of what the step leaves of budget and pages.

        Args:
          draft: a step to which nothing else is added.
          reserve: pages to leave.
        """
        for sequence in draft.chunks if self.on else ():
            most = min(self._most, sequence.remaining - 1, draft.left)
            if most < 1 or sequence.uncomputed != 1 or not self.includes(sequence):
                continue
            guesses = self.drafter.propose(sequence, most)
            stop, spare = sequence.computed + 1, max(0, self._memory.available - reserve)
            while guesses and self._memory.missing(sequence, stop + len(guesses)) > spare:
                guesses.pop()
            if guesses:
                draft.guess(sequence, guesses, self._memory.prepare(sequence, stop + len(guesses)))

    def verify(self, row: Row, new: SequenceOf[int]) -> None:
        """Counts the guesses that ``new``, the tokens that became known, show to be right."""
        sequence, accepted = row.sequence, row.accepted(new)
        if sequence.state is State.RUNNING:  # or else it has lost its pages
            sequence.computed += accepted
            self.drafter.learn(sequence, row.drafts, accepted)
        self._statistics.accepted += accepted
        self._statistics.decoded += len(new) - row.samples
