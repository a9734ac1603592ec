"""Guesses how texts go on, by what followed where their last tokens stood before: no model, only the texts."""

import array
import dataclasses
from typing import Protocol

from ml.serve.scheduling.request import Sequence

# Shorter n-grams recur by chance: in most texts, what followed one of them is rarely what comes next.
_SHORTEST = 2


class Drafter(Protocol):
    """Whoever guesses the next tokens of sequences for a scheduler; wrong guesses cost time, and change no text."""

    def propose(self, sequence: Sequence, most: int) -> "array.array[int]":
        """Guesses the tokens after the known ones, all of which it may look at; at most ``most``, perhaps none."""
        ...

    def learn(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        """Hears how many of the guesses that were tried were right."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """Hears that a sequence does not run any more; it may come again."""
        ...


class Ngrams:
    """Where the n-grams of one text that grows stand, the longest of which to agree says how the text goes on.

    The work per new token does not depend on the text's length.
    """

    def __init__(self, longest: int):
        """Looks up n-grams of ``longest`` tokens, then shorter ones, down to 2 (1, if that is the longest)."""
        # By their size, the longest first: where the token stands that came after an n-gram when it was last seen.
        self._after: dict[int, dict[bytes, int]] = {
            size: {} for size in range(longest, min(_SHORTEST, longest) - 1, -1)
        }
        self._indexed = 0

    def propose(self, tokens: "array.array[int]", most: int) -> "array.array[int]":
        """Guesses at most ``most`` tokens that come after ``tokens``: the text so far, which only ever grows.

        What was copied is copied on, so that a text which repeats itself is guessed to go on doing so.
        """
        length = len(tokens)
        for size, after in self._after.items():
            for position in range(max(size, self._indexed), length):
                after[tokens[position - size : position].tobytes()] = position
        self._indexed = length
        for size, after in self._after.items():
            begin = after.get(tokens[-size:].tobytes())
            if begin is not None:
                copied = tokens[begin : begin + most]
                return (copied * -(-most // len(copied)))[:most]
        return array.array("i")


@dataclasses.dataclass
class _Text:
    ngrams: Ngrams
    width: int  # guesses that are worth trying


class NgramDrafter:
    """Prompt lookup (Saxena 2023) for all that run, each with as many guesses as have been right of late."""

    def __init__(self, most: int, longest: int):
        """Guesses at most ``most`` tokens of a sequence at once, after n-grams of at most ``longest``."""
        self._most, self._longest = most, longest
        self._texts: dict[Sequence, _Text] = {}

    def propose(self, sequence: Sequence, most: int) -> "array.array[int]":
        """See `Drafter.propose`."""
        text = self._texts.get(sequence)
        if text is None:
            text = self._texts[sequence] = _Text(Ngrams(self._longest), self._most)
        return text.ngrams.propose(sequence.tokens, min(most, text.width))

    def learn(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        """See `Drafter.learn`."""
        text = self._texts.get(sequence)
        if text is not None:
            right = accepted == drafted
            text.width = min(self._most, 2 * text.width) if right else max(accepted + 1, text.width // 2)

    def forget(self, sequence: Sequence) -> None:
        """See `Drafter.forget`."""
        self._texts.pop(sequence, None)
