"""The thread that owns an engine: requests in from event loops, tokens out to them, and nothing that stops it."""

import asyncio
import collections
import dataclasses
import functools
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from ml.errors import UserError
from ml.serve.api.stream import Delta, RequestError, Stream
from ml.serve.sampling import SamplingParams
from ml.serve.scheduling.request import FinishReason

_log = logging.getLogger(__name__)
_Command = Callable[[set[Stream]], None]  # adds the streams that have news


class QueueFull(Exception):
    """Too many requests wait already."""


class Draining(Exception):
    """The server ends, and takes no more requests."""


class EngineLike(Protocol):
    """What the driver needs of `ml.serve.Engine`."""

    @property
    def unfinished(self) -> bool: ...
    def add(self, prompt: Sequence[int], sampling: SamplingParams, request_id: str | None = None) -> list[Any]: ...
    def prompt_logprobs(self, request_id: str) -> list[Any] | None: ...
    def cancel(self, request_id: str, index: int | None = None) -> list[Any]: ...
    def step(self) -> list[tuple[Any, list[Any] | None]]: ...
    def reset(self) -> None: ...


class Observer:
    """Told of what happens, in the engine's thread; does nothing by itself."""

    def tokens(self, stream: Stream, count: int, seconds: float, first: bool) -> None:
        """A sample has ``count`` new tokens, ``seconds`` after its last ones (``first``: after its submission)."""

    def finished(self, stream: Stream, reason: str, seconds: float) -> None:
        """A request has ended, ``seconds`` after its submission."""

    def failed(self, error: Exception) -> None:
        """A whole step failed."""


@dataclasses.dataclass
class _Entry:
    """A request that the engine has."""

    stream: Stream
    sampling: SamplingParams
    submitted: float
    last: dict[int, float]


class Driver:
    """Runs an engine in a thread of its own and is the only one to touch it.

    `submit`, `Stream.cancel` and the rest may be called from any event loop. When a step fails as a whole, the requests
    that it had are told, the engine is emptied, and the next request finds it as new.
    """

    def __init__(self, engine: EngineLike, *, capacity: int, observer: Observer | None = None):
        """Does not start yet.

        Args:
          engine: touched by nobody else from `start` on.
          capacity: most samples that are not finished: those that run and those that wait.
          observer: is told what happens.
        """
        self.capacity = capacity
        self._engine, self._observer = engine, observer or Observer()
        self._condition = threading.Condition()
        self._inbox: collections.deque[_Command] = collections.deque()
        self._open = 0
        self._draining = self._closing = False
        self._entries: dict[str, _Entry] = {}
        self._names = itertools.count()
        self._broken: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def unfinished(self) -> int:
        """Samples that were accepted and have not ended."""
        return self._open

    @property
    def draining(self) -> bool:
        """Whether new requests are refused because the server ends."""
        return self._draining

    @property
    def healthy(self) -> bool:
        """Whether the engine runs."""
        return self._thread.is_alive() and self._broken is None

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    async def submit(self, prompt: Sequence[int], sampling: SamplingParams) -> Stream:
        """Hands one request to the engine; see `submit_all`."""
        (stream,) = await self.submit_all([prompt], [sampling])
        return stream

    async def submit_all(self, prompts: Sequence[Sequence[int]], sampling: Sequence[SamplingParams]) -> list[Stream]:
        """Hands requests to the engine, all or none; returns when that has accepted them.

        ``capacity`` may be passed once: what is submitted while there is a place comes in whole.

        Returns:
          A stream for each, with one event for all.

        Raises:
          UserError: the engine refuses a request.
          QueueFull: as many as ``capacity`` are unfinished.
          Draining: `drain` was called.
          RequestError: the engine has broken down.
        """
        event = asyncio.Event()
        streams = [
            self._stream(len(prompt), each.samples, event) for prompt, each in zip(prompts, sampling, strict=True)
        ]
        with self._condition:
            if self._broken is not None:
                raise RequestError("the engine has broken down") from self._broken
            if self._draining:
                raise Draining
            if self._open >= self.capacity:
                raise QueueFull
            begin = time.monotonic()
            for stream, prompt, each in zip(streams, prompts, sampling, strict=True):
                self._open += stream.samples
                self._inbox.append(functools.partial(self._add, stream, prompt, each, begin))
            self._condition.notify()
        try:
            for stream in streams:
                await stream.admitted
        except BaseException:
            for stream in streams:
                stream.admitted.cancel()
                stream.cancel()
            raise
        return streams

    async def drain(self, seconds: float) -> bool:
        """Takes no more requests, lets those that run end, and stops the thread.

        Args:
          seconds: most that they get; then they end with an error.

        Returns:
          Whether all ended by themselves.
        """
        with self._condition:
            self._draining = True
        end = time.monotonic() + seconds
        while self._open and self.healthy and time.monotonic() < end:
            await asyncio.sleep(0.02)
        clean = not self._open
        with self._condition:
            self._closing = True
            self._condition.notify()
        await asyncio.to_thread(self._thread.join)
        return clean

    def _stream(self, length: int, samples: int, event: asyncio.Event) -> Stream:
        name = f"r{next(self._names)}"
        return Stream(
            name, samples, length, lambda index: self._post(functools.partial(self._drop, name, index)), event
        )

    # What follows runs in the engine's thread.

    def _run(self) -> None:
        try:
            while not self._closing:
                with self._condition:
                    while not (self._inbox or self._closing or self._engine.unfinished):
                        self._condition.wait()
                self._turn()
        except Exception as error:  # resetting failed too
            _log.exception("the engine has broken down")
            self._broken = error
        finally:
            with self._condition:
                self._draining = self._closing = True
                commands, self._inbox = self._inbox, collections.deque()
            for command in commands:  # so that nobody waits for an answer
                command(set())
            self._end_all(RequestError("the server ended before the request did"))

    def _turn(self) -> None:
        """Does what was asked, and one step."""
        touched: set[Stream] = set()
        with self._condition:
            commands, self._inbox = self._inbox, collections.deque()
        try:
            for command in commands:
                command(touched)
            if self._engine.unfinished and not self._closing:
                self._step(touched)
        except Exception as error:
            _log.exception("a step failed; the requests that ran are ended")
            self._observer.failed(error)
            self._engine.reset()
            self._end_all(RequestError("the engine failed while it worked on this request"))
        finally:
            _wake(touched)

    def _post(self, command: _Command) -> None:
        with self._condition:
            self._inbox.append(command)
            self._condition.notify()

    def _add(
        self, stream: Stream, prompt: Sequence[int], sampling: SamplingParams, begin: float, _: set[Stream]
    ) -> None:
        answer: Exception | None = None
        if self._closing or self._broken is not None:
            answer = RequestError("the server ended before the request began")
        else:
            try:
                self._engine.add(prompt, sampling, stream.request_id)
                self._entries[stream.request_id] = _Entry(stream, sampling, begin, {})
            except UserError as error:
                answer = error
            except Exception as error:
                _log.exception("a request could not be added")
                answer = error
        if answer is not None:
            self._close(stream.samples)
        _soon(stream.loop, lambda: _settle(stream.admitted, answer))

    def _drop(self, name: str, index: int | None, touched: set[Stream]) -> None:
        entry = self._entries.get(name)
        if entry is None:
            return
        self._engine.cancel(name, index)
        for each in range(entry.stream.samples) if index is None else [index]:
            if self._put(entry, Delta(each, finish_reason="cancelled")):
                touched.add(entry.stream)

    def _step(self, touched: set[Stream]) -> None:
        for update, logprobs in self._engine.step():
            entry = self._entries.get(update.sequence.request.id)
            if entry is None:
                continue
            reason = update.finish_reason
            if reason is FinishReason.FAILED:
                self._engine.cancel(entry.stream.request_id)
                if self._fail(entry, RequestError("the engine failed on this request")):
                    touched.add(entry.stream)
                continue
            if update.sequence.index == 0:
                entry.stream.cached = update.sequence.cached
            if entry.sampling.prompt_logprobs is not None and not entry.stream.prompt_logprobs:
                entry.stream.prompt_logprobs = self._engine.prompt_logprobs(update.sequence.request.id) or ()
            tokens, logprobs = list(update.tokens), logprobs or []
            if reason is FinishReason.STOP:
                tokens = tokens[:-1]
            delta = Delta(update.sequence.index, tokens, logprobs, reason and reason.value)
            if self._put(entry, delta, drawn=len(update.tokens)):
                touched.add(entry.stream)

    def _put(self, entry: _Entry, delta: Delta, drawn: int = 0) -> bool:
        """Passes on news of a sample, and forgets the request with its last."""
        stream, now = entry.stream, time.monotonic()
        if stream.request_id not in self._entries:
            return False
        if drawn:
            before = entry.last.get(delta.index)
            self._observer.tokens(stream, drawn, now - (entry.submitted if before is None else before), before is None)
            entry.last[delta.index] = now
        ended = stream.ended
        told = stream.put(delta)
        self._close(stream.ended - ended)
        if stream.done:
            del self._entries[stream.request_id]
            self._observer.finished(stream, delta.finish_reason or "", now - entry.submitted)
        return told

    def _fail(self, entry: _Entry, error: Exception) -> bool:
        stream = entry.stream
        self._close(stream.samples - stream.ended)
        del self._entries[stream.request_id]
        self._observer.finished(stream, "failed", time.monotonic() - entry.submitted)
        return stream.fail(error)

    def _end_all(self, error: Exception) -> None:
        _wake([entry.stream for entry in list(self._entries.values()) if self._fail(entry, error)])

    def _close(self, samples: int) -> None:
        if samples:
            with self._condition:
                self._open -= samples


def _settle(future: asyncio.Future[None], error: Exception | None) -> None:
    if future.done():  # its reader has gone
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


def _wake(streams: Iterable[Stream]) -> None:
    """One call into each event loop, however many of its streams have news."""
    loops: dict[asyncio.AbstractEventLoop, list[Stream]] = {}
    for stream in streams:
        loops.setdefault(stream.loop, []).append(stream)
    for loop, those in loops.items():
        _soon(loop, functools.partial(_wake_here, those))


def _wake_here(streams: Iterable[Stream]) -> None:
    for stream in streams:
        stream.wake()


def _soon(loop: asyncio.AbstractEventLoop, call: Callable[[], Any]) -> None:
    try:
        loop.call_soon_threadsafe(call)
    except RuntimeError:  # closed, and its readers with it
        _log.debug("a reader's event loop is closed")
