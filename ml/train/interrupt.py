"""Signals that ask a run to stop: noted, and obeyed between two steps."""

import signal
from types import FrameType
from typing import Any


class Interrupt:
    """While entered, SIGTERM and the first Ctrl-C are only noted; a second Ctrl-C raises ``KeyboardInterrupt``.

    Attributes:
      received: the signal, once there was one.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupt":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
