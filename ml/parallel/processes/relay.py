"""A local door to JAX's coordination service that stays open when the service dies.

JAX's client ends its process at once (``LOG(FATAL)``, status 134) when the connection to the coordination service is
closed, which is what happens when process 0 dies: no one could say any more who died and how to go on. A client that
connects through a relay sees a silent service instead, which it tolerates for ``heartbeat_timeout_seconds``: enough for
`ml.parallel.processes.health` to name the dead process and to end this one.
"""

import contextlib
import socket
import threading
import time

from ml.parallel.processes.connection import close_in_forked_children

_CHUNK = 1 << 16


class Relay:
    """Listens on a loopback port and passes on what comes, both ways, until the process ends.

    Attributes:
      address: ``127.0.0.1:PORT`` for the client.
    """

    def __init__(self, host: str, port: int, connect_seconds: float):
        """Starts to listen.

        Args:
          host, port: of the service.
          connect_seconds: how long to try to reach it, once a client has come.
        """
        self._target, self._connect_seconds = (host, port), connect_seconds
        self._listener = socket.create_server(("127.0.0.1", 0))
        close_in_forked_children(self._listener)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, name="relay", daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            close_in_forked_children(client)
            threading.Thread(target=self._serve, args=(client,), name="relay", daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        service = self._connect()
        if service is None:
            client.close()
            return
        close_in_forked_children(service)
        threading.Thread(target=_pump, args=(service, client), name="relay", daemon=True).start()
        _pump(client, service)
        with contextlib.suppress(OSError):  # the client is done: so is the service's side of it
            service.shutdown(socket.SHUT_RDWR)

    def _connect(self) -> socket.socket | None:
        end = time.monotonic() + self._connect_seconds
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                service = socket.create_connection(self._target, timeout=self._connect_seconds)
                service.settimeout(None)
                return service
            time.sleep(0.1)
        return None


def _pump(source: socket.socket, target: socket.socket) -> None:
    """Copies until ``source`` ends; a ``target`` that is gone swallows the rest."""
    gone = False
    while True:
        try:
            data = source.recv(_CHUNK)
        except OSError:
            return
        if not data:
            return
        if not gone:
            try:
                target.sendall(data)
            except OSError:
                gone = True
