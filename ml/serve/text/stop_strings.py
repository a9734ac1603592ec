"""Stop strings: where the text of a sample ends, and what of it may be shown before that is known."""

from collections.abc import Sequence

from ml.serve.text.text_stream import TextStream


class StoppableText:
    """Text of one sample as it grows; holds back what may be the beginning of a stop string.

    Attributes:
      text: all that was given out so far.
      stopped: the stop string that came; then the sample should be cancelled, and what is pushed later is ignored.
      tokens: how many tokens were taken, the one that completed the stop string included.
    """

    def __init__(
        self, stream: TextStream, stop: Sequence[str] = (), include_stop: bool = False, *, min_tokens: int = 0
    ):
        """Starts with nothing.

        Args:
          stream: of this sample.
          stop: strings that end the text; of several that begin in it, the one that is complete first, and of those the
            one that begins first.
          include_stop: whether the stop string is part of the text.
          min_tokens: stop strings that are complete before this many tokens are text like any other.
        """
        if not all(stop):
            raise ValueError("stop: an empty string would end every text at once")
        self._stream, self._stop, self._include, self._min_tokens = stream, tuple(stop), include_stop, min_tokens
        self._held = ""
        self._longest = max(map(len, self._stop), default=0)
        self.text = ""
        self.stopped: str | None = None
        self.tokens = 0

    def push(self, tokens: Sequence[int]) -> str:
        """Takes more tokens; returns the text that is new and safe to show."""
        shown = ""
        for token in tokens:
            if self.stopped is not None:
                break
            self.tokens += 1
            shown += self._grow(self._stream.push((token,)))
        self.text += shown
        return shown

    def finish(self) -> str:
        """The rest, when the sample ended by itself; a stop string may still come to light in it."""
        if self.stopped is not None:
            return ""
        shown = self._grow(self._stream.finish()) + self._held
        self._held = ""
        self.text += shown
        return shown

    def _grow(self, new: str) -> str:
        if not new:
            return ""
        self._held += new
        if self.tokens >= self._min_tokens and (found := self._find(len(self._held) - len(new))) is not None:
            start, self.stopped = found
            shown = self._held[: start + len(self.stopped) * self._include]
            self._held = ""
            return shown
        keep = self._beginning()
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def _find(self, old: int) -> tuple[int, str] | None:
        """The first stop string that is complete, where it must end behind the first ``old`` characters."""
        found = []
        for stop in self._stop:
            start = self._held.find(stop, max(0, old - len(stop) + 1))
            if start >= 0:
                found.append((start + len(stop), start, stop))
        return min(found)[1:] if found else None

    def _beginning(self) -> int:
        """How many characters at the end may become a stop string."""
        for length in range(min(self._longest - 1, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(len(stop) > length and stop.startswith(end) for stop in self._stop):
                return length
        return 0
