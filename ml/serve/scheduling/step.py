"""What the scheduler hands to the device, and what it says of the results."""

import array
import dataclasses
from collections.abc import Sequence as SequenceOf

from ml.serve.scheduling.request import FinishReason, Sequence


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """One sequence's part in a step.

    Attributes:
      sequence: whose it is.
      slot: the sequence's number among those that run; the device keeps the last token it drew under this number.
      table: pages of the sequence, those to be written included.
      start: position of the first token fed.
      tokens: the tokens fed; empty: one, the last that was drawn in this slot, which the host may not know yet.
      samples: tokens to draw, at most `Step.decode_steps`; 0: a chunk of a prompt that goes on. The first is drawn
        after the last token fed; each further one after the one before it.
      number: tokens drawn for this sequence before.
      drafts: how many of the tokens fed, at their end, are guesses; a token is drawn after each of them too. Those
        that follow wrong guesses are worth nothing.
    """

    sequence: Sequence
    slot: int
    table: "array.array[int]"
    start: int
    tokens: "array.array[int]"
    samples: int
    number: int
    drafts: int = 0

    @property
    def fed(self) -> int:
        """Tokens fed in the first forward pass."""
        return len(self.tokens) or 1

    @property
    def draws(self) -> int:
        """Tokens drawn, those after guesses included."""
        return self.samples + self.drafts

    def accepted(self, drawn: SequenceOf[int]) -> int:
        """How many of the guesses are right: are what was drawn where they stand, as is all before them."""
        guesses = self.tokens[len(self.tokens) - self.drafts :]
        pairs = enumerate(zip(guesses, drawn, strict=False))
        return next((i for i, (guess, token) in pairs if guess != token), min(self.drafts, len(drawn)))


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One dispatch. Steps run in the order in which they were handed out; each sees what those before it wrote.

    Attributes:
      number: counts steps.
      rows: those that decode come first.
      copies: pages ``(from, to)`` to copy before anything is written; no page is both.
      decode_steps: forward passes: 1, or, if all rows decode, more; a row takes part in its first ``samples`` ones.
    """

    number: int
    rows: tuple[Row, ...]
    copies: tuple[tuple[int, int], ...]
    decode_steps: int

    @property
    def fed(self) -> int:
        """Tokens fed in the first forward pass."""
        return sum(row.fed for row in self.rows)

    @property
    def drafts(self) -> int:
        """Guesses among them."""
        return sum(row.drafts for row in self.rows)


@dataclasses.dataclass(frozen=True, eq=False)
class Update:
    """News of a sequence.

    Attributes:
      sequence: whose.
      tokens: drawn tokens that became known, a stop token included.
      finish_reason: ``None``: it goes on.
    """

    sequence: Sequence
    tokens: tuple[int, ...]
    finish_reason: FinishReason | None
