"""Token ids to text while they come: never half a character, and the same text as decoding all at once."""

from collections.abc import Callable, Iterable, Sequence

_BROKEN = "\N{REPLACEMENT CHARACTER}"
# The first bytes of a character that misses its last one: at most three, and a decoder may show each by itself.
_MOST_HELD = 3
# Ids of the prompt that are decoded with the first new ones: a few more if these would begin inside a character.
_CONTEXT = (8, 9, 10, 11, 16, 32)


class TextStream:
    """Decodes one sequence piece by piece.

    Ids are decoded together with the few before them: what a token reads as depends on its left neighbour (a leading
    space, the first bytes of a character).
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int] = ()):
        """Starts after ``prompt``, whose text is not given out again.

        Args:
          decode: ids to text; incomplete characters become U+FFFD.
          prompt: ids of whole characters that the sequence continues.
        """
        self._decode = decode
        self._ids = _context(decode, prompt)
        self._given = decode(self._ids) if self._ids else ""  # what of the window's text is out already
        self._clean = len(self._ids)  # ids up to here end at the end of a character

    def push(self, ids: Iterable[int]) -> str:
        """Takes more ids; returns the text that is now certain."""
        # One by one: some decoders give up on a whole run of bytes when only its last character is incomplete.
        return "".join(map(self._push, ids))

    def _push(self, token: int) -> str:
        self._ids.append(token)
        text = self._decode(self._ids)
        held = min(len(text) - len(text.rstrip(_BROKEN)), _MOST_HELD)
        certain = text[: len(text) - held]
        if not certain.startswith(self._given):
            return ""
        new = certain[len(self._given) :]
        if held:
            self._given = certain
        else:
            # Move the window up, keeping the ids since the last whole character as the context of the next.
            del self._ids[: self._clean]
            self._clean = len(self._ids)
            self._given = self._decode(self._ids)
        return new

    def finish(self) -> str:
        """The text still held back, incomplete characters as U+FFFD."""
        text = self._decode(self._ids)
        new = text[len(self._given) :]
        self._given = text
        return new


def _context(decode: Callable[[Sequence[int]], str], prompt: Sequence[int]) -> list[int]:
    """The end of the prompt, cut between two characters."""
    tail: list[int] = []
    for size in _CONTEXT:
        tail = list(prompt[-size:])
        if len(tail) == len(prompt) or not decode(tail).startswith(_BROKEN):
            break
    return tail
