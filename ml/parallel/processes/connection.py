"""A TCP connection that carries JSON messages, one a line, and never blocks."""

import contextlib
import json
import os
import select
import socket
import time
from collections.abc import Iterable
from typing import Any, Protocol

_CHUNK = 1 << 16
_LONGEST_LINE = 1 << 20


def close_in_forked_children(connection: socket.socket) -> None:
    """Data workers may outlive a killed process; were they to hold its sockets, no one would see these close."""
    os.register_at_fork(after_in_child=connection.close)


class _HasDescriptor(Protocol):
    def fileno(self) -> int: ...


def wait_for(readable: Iterable[_HasDescriptor], seconds: float) -> None:
    """Returns when there is something to read, or after ``seconds``."""
    poll = select.poll()  # unlike `select.select` it takes any number of descriptors
    for one in readable:
        if one.fileno() >= 0:
            poll.register(one, select.POLLIN)
    poll.poll(1000 * seconds)


class Connection:
    """Messages to and from one process.

    Attributes:
      closed: whether the other side closed it, or it broke.
    """

    def __init__(self, connected: socket.socket):
        connected.setblocking(False)
        with contextlib.suppress(OSError):
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        close_in_forked_children(connected)
        self._socket, self._incoming, self._outgoing = connected, b"", b""
        self.closed = False

    def fileno(self) -> int:
        """For `wait_for`."""
        return self._socket.fileno()

    def send(self, **message: Any) -> None:
        """Queues a message, and sends as much of the queue as goes out without waiting."""
        self._outgoing += json.dumps(message).encode() + b"\n"
        self._flush()

    def receive(self) -> list[dict[str, Any]]:
        """What has come since the last call. Anything but lines of JSON objects closes the connection."""
        self._flush()
        try:
            while not self.closed:
                data = self._socket.recv(_CHUNK)
                self._incoming += data
                self.closed = not data or len(self._incoming) > _LONGEST_LINE
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True
        *lines, self._incoming = self._incoming.split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            messages = [None]
        if not all(isinstance(message, dict) for message in messages):
            self.closed = True
            return []
        return messages

    def finish(self, seconds: float) -> None:
        """Sends what is queued, then waits until the other side has read it and closed; at most ``seconds``.

        A socket that is closed while unread bytes lie in it is reset, and what was sent through it may be lost.
        """
        end = time.monotonic() + seconds
        half_closed = False
        while not self.closed and time.monotonic() < end:
            self.receive()
            if not self._outgoing and not half_closed:
                half_closed = True
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_WR)
            time.sleep(0.01)
        self._socket.close()

    def close(self) -> None:
        """Closes this side."""
        self.closed = True
        self._socket.close()

    def _flush(self) -> None:
        try:
            while self._outgoing:
                self._outgoing = self._outgoing[self._socket.send(self._outgoing) :]
        except BlockingIOError:
            pass
        except OSError:
            self._outgoing = b""  # that it is closed, `receive` finds out once it has read what came before
