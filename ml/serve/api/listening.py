"""Runs the application until a signal, and ends it without losing what runs."""

import asyncio
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from ml.errors import UserError

_LAST_BYTES = 5  # seconds for answers that are complete to reach their clients


def listen(host: str, port: int) -> socket.socket:
    """A socket that the server will accept from; raises `UserError` if the address cannot be had."""
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UserError(f"--host={host} --port={port}: cannot be listened on: {why}; choose another") from error
    return bound


def serve(app: FastAPI, bound: socket.socket, *, drain_seconds: float, ready: Callable[[], None]) -> None:
    """Serves until SIGTERM or SIGINT; then drains, and returns. A second signal ends at once.

    Args:
      app: of `ml.serve.api.app.create_app`.
      bound: of `listen`.
      drain_seconds: most seconds that running requests get after the signal; new ones get 503 meanwhile.
      ready: called when requests are accepted.
    """
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_keep_alive=30, timeout_graceful_shutdown=_LAST_BYTES
    )
    _Server(config, app, drain_seconds, ready).run(sockets=[bound])


class _Server(uvicorn.Server):
    """Uvicorn, that drains between the signal and the end."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, drain_seconds: float, ready: Callable[[], None]):
        super().__init__(config)
        self._app, self._drain_seconds, self._ready = app, drain_seconds, ready
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See `uvicorn.Server.startup`."""
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> Any:
        """Begins the end; runs as a signal handler. Nothing is kept to be raised again: the end is an orderly one."""
        if self._loop is None or self._draining is not None:
            self.should_exit = self.force_exit = True
        else:
            self._loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        try:
            await self._app.state.drain(self._drain_seconds)
        finally:
            self.should_exit = True
