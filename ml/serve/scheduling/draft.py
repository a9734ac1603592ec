"""A step in the making."""

import array

from ml.serve.scheduling.request import Sequence
from ml.serve.scheduling.step import Row, Step


class Draft:
    """Collects who takes part in a step, under a budget of tokens.

    Attributes:
      left: tokens that can still be fed.
      chunks: tokens that each sequence feeds.
      copies: pages that each sequence copies first.
      guesses: tokens that some of them feed after what they know.
    """

    def __init__(self, budget: int):
        self.left = budget
        self.chunks: dict[Sequence, int] = {}
        self.copies: dict[Sequence, list[tuple[int, int]]] = {}
        self.guesses: dict[Sequence, array.array[int]] = {}

    def add(self, sequence: Sequence, chunk: int, copies: list[tuple[int, int]]) -> None:
        """Takes a sequence in."""
        self.chunks[sequence], self.copies[sequence] = chunk, copies
        self.left -= chunk

    def guess(self, sequence: Sequence, tokens: "array.array[int]", copies: list[tuple[int, int]]) -> None:
        """Has a sequence that is in the step, and whose tokens are all known, feed some that are not."""
        self.guesses[sequence] = tokens
        self.copies[sequence] += copies
        self.left -= len(tokens)

    def step(self, number: int, decode_steps: int) -> Step:
        """The step; sequences are as they were before it."""
        rows = []
        for sequence, chunk in self.chunks.items():
            start = sequence.computed
            guesses = self.guesses.get(sequence, array.array("i"))
            known = array.array("i") if sequence.pending else sequence.tokens[start : start + chunk]
            rows.append(
                Row(
                    sequence=sequence,
                    slot=sequence.slot,
                    table=sequence.table[:],
                    start=start,
                    tokens=known + guesses,
                    samples=min(decode_steps, sequence.remaining) if chunk == sequence.uncomputed else 0,
                    number=sequence.drawn,
                    drafts=len(guesses),
                )
            )
        copies = [pair for pairs in self.copies.values() for pair in pairs]
        return Step(number, tuple(rows), tuple(copies), decode_steps)
