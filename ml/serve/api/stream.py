"""What a request's reader sees of it: tokens as they come, merged while the reader is slow."""

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator, Callable, Sequence

from ml.serve.sampling import TokenLogprobs


class RequestError(Exception):
    """A request ended without its answer, through no fault of its sender."""


@dataclasses.dataclass
class Delta:
    """News of one sample.

    Attributes:
      index: which of the request's samples.
      tokens: those that are new, without the stop token.
      logprobs: of each of them, and of the stop token, if they are needed.
      finish_reason: ``stop``, ``length`` or ``cancelled`` with a sample's last news, else ``None``.
    """

    index: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None


class Stream(AsyncIterator[Delta]):
    """One request, written by the engine's thread and read in the event loop that submitted it.

    What the reader has not taken is kept as one `Delta` per sample, which grows: a slow reader neither stops the engine
    nor loses a token, and costs no more than the text itself.
    """

    cached = 0  # tokens of the prompt that were in the cache, as soon as there is news
    prompt_logprobs: Sequence[TokenLogprobs | None] = ()  # if they were asked for, likewise

    def __init__(
        self,
        request_id: str,
        samples: int,
        prompt_tokens: int,
        cancel: Callable[[int | None], None],
        event: asyncio.Event | None = None,
    ):
        """Belongs to the running event loop.

        Args:
          request_id: the engine's name of it.
          samples: how many end before the stream ends.
          prompt_tokens: length of the prompt.
          cancel: tells the engine that a sample (``None``: that everything) is no longer wanted.
          event: set when there is news; several streams may have one together.
        """
        self.request_id, self.samples, self.prompt_tokens = request_id, samples, prompt_tokens
        self.loop = asyncio.get_running_loop()
        self.admitted: asyncio.Future[None] = self.loop.create_future()
        self._cancel = cancel
        self._lock = threading.Lock()
        self._news: dict[int, Delta] = {}
        self._ended: set[int] = set()
        self._error: Exception | None = None
        self.event = asyncio.Event() if event is None else event
        self._told = False  # whether the loop knows of what is there

    # In the event loop.

    async def __anext__(self) -> Delta:
        while True:
            self.event.clear()
            done = self.done  # before looking: what comes later wakes us
            if (delta := self.take()) is not None:
                return delta
            if done:
                raise StopAsyncIteration
            await self.event.wait()

    def take(self) -> Delta | None:
        """What is there, of one sample; ``None``: nothing. Clear `event` before looking.

        Raises:
          RequestError: the request failed, and all that came before has been taken.
        """
        with self._lock:
            if self._news:
                return self._news.pop(next(iter(self._news)))
            if self._error is not None:
                raise self._error
            self._told = False
            return None

    def cancel(self, index: int | None = None) -> None:
        """Wants no more of a sample, or of all; what has ended is left alone. Pages are free with the next step."""
        with self._lock:
            done = self.done if index is None else index in self._ended
        if not done:
            self._cancel(index)

    def wake(self) -> None:
        """Lets the reader look."""
        self.event.set()

    @property
    def done(self) -> bool:
        """Whether nothing more comes (though the reader may have some left to read)."""
        return self._error is not None or len(self._ended) == self.samples

    @property
    def ended(self) -> int:
        """How many samples have ended."""
        return len(self._ended)

    # In the engine's thread. What returns a bool says whether the event loop must be told.

    def put(self, delta: Delta) -> bool:
        """Adds news."""
        with self._lock:
            if self._error is not None or delta.index in self._ended:
                return False
            kept = self._news.setdefault(delta.index, Delta(delta.index))
            kept.tokens += delta.tokens
            kept.logprobs += delta.logprobs
            if delta.finish_reason is not None:
                kept.finish_reason = delta.finish_reason
                self._ended.add(delta.index)
            return self._tell()

    def fail(self, error: Exception) -> bool:
        """Ends the stream; the reader gets ``error`` after what came before."""
        with self._lock:
            if self._error is None:
                self._error = error
            return self._tell()

    def _tell(self) -> bool:
        told, self._told = self._told, True
        return not told
