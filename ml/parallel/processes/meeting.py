"""How the processes of a run find one another before JAX does: process 0 listens, the others introduce themselves.

JAX's own start leaves a wrong count, a number given twice or a process that never comes to a timeout that names no one.
The connections that are made here stay, and carry the signs of life of `ml.parallel.processes.health`.
"""

import contextlib
import dataclasses
import errno
import socket
import time
from collections.abc import Callable

from ml.errors import UserError
from ml.parallel.processes.connection import Connection, wait_for
from ml.parallel.processes.roll import Identity

_POLL = 0.1
_FAREWELL = 2.0


@dataclasses.dataclass(frozen=True)
class Meeting:
    """Everyone is here.

    Attributes:
      identities: of all processes as far as this one knows them: all for process 0, process 0 alone for the others.
      connections: by process: all others for process 0, process 0 for the others.
      service_port: where process 0 has JAX's coordination service.
    """

    identities: tuple[Identity, ...]
    connections: dict[int, Connection]
    service_port: int


def split_address(address: str) -> tuple[str, int]:
    """``HOST:PORT`` -> host, port.

    Raises:
      UserError: it is something else.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator={address} must be HOST:PORT of process 0, such as 10.0.0.1:8476")
    return host.strip("[]"), int(port)


def host_meeting(address: str, processes: int, me: Identity, seconds: float) -> Meeting:
    """Process 0: waits for the others.

    Args:
      address: ``HOST:PORT``, which the others know too; JAX gets port ``PORT + 1``, or another if that is taken.
      processes: how many there are, this one included.
      me: this process.
      seconds: how long to wait for the last one.

    Raises:
      UserError: the port is in use, someone does not come, or someone was told otherwise about the run.
    """
    host, port = split_address(address)
    waiting: list[Connection] = []
    here: dict[int, tuple[Identity, Connection]] = {}
    with _listen(host, port, address) as listener:
        listener.setblocking(False)
        end = time.monotonic() + seconds
        while len(here) < processes - 1:
            if time.monotonic() > end:
                _refuse(here, _missing(address, processes, me, here, seconds))
            wait_for([listener, *waiting, *(connection for _, connection in here.values())], _POLL)
            with contextlib.suppress(BlockingIOError):
                waiting.append(Connection(listener.accept()[0]))
            for connection in list(waiting):
                messages = connection.receive()
                if messages or connection.closed:
                    waiting.remove(connection)
                if connection.closed:
                    connection.close()
                elif messages:
                    _admit(messages[0], connection, here, processes, me)
            for process, (_, connection) in list(here.items()):
                connection.receive()
                if connection.closed:  # it may come again
                    del here[process]
    for connection in waiting:
        connection.close()
    service_port = _free_port(port + 1)
    connections = {process: connection for process, (_, connection) in sorted(here.items())}
    for connection in connections.values():
        connection.send(welcome=dataclasses.asdict(me), service=service_port)
    identities = (me, *(here[process][0] for process in connections))
    return Meeting(identities, connections, service_port)


def attend_meeting(address: str, processes: int, me: Identity, seconds: float) -> Meeting:
    """Any other process: introduces itself to process 0, and waits until all have come.

    Args: as of `host_meeting`.

    Raises:
      UserError: process 0 cannot be reached, refuses this process, or goes away.
    """
    host, port = split_address(address)
    connection = Connection(_reach(host, port, address, seconds))
    connection.send(hello=dataclasses.asdict(me), processes=processes)
    end = time.monotonic() + seconds + _FAREWELL  # process 0 is the one to tell who is missing
    while not (messages := connection.receive()):
        if connection.closed:
            raise UserError(f"process 0 at --coordinator={address} went away before all had come; see what it printed")
        if time.monotonic() > end:
            raise UserError(
                f"--coordinator={address} does not answer within {seconds:g} s; does process 0 listen there?"
            )
        wait_for([connection], _POLL)
    answer = messages[0]
    if "welcome" not in answer:
        connection.close()
        raise UserError(str(answer.get("refused", f"--coordinator={address} is not this run's process 0")))
    return Meeting((Identity(**answer["welcome"]),), {0: connection}, int(answer["service"]))


def _admit(
    message: dict, connection: Connection, here: dict[int, tuple[Identity, Connection]], processes: int, me: Identity
) -> None:
    try:
        identity, told = Identity(**message["hello"]), int(message["processes"])
    except (KeyError, TypeError, ValueError):
        connection.close()  # not one of ours
        return
    taken = me if identity.process == 0 else here.get(identity.process, (None,))[0]
    problem = None
    if told != processes:
        problem = f"--num_processes={told} for {identity}, but {processes} for {me}; give all the same number"
    elif taken is not None:
        problem = f"--process_id={identity.process} was given to {taken} and to {identity}; give each its own"
    elif not 0 < identity.process < processes:
        problem = f"--process_id={identity.process} of {identity} must lie in [0, {processes})"
    if problem is not None:
        _refuse({**here, -1: (identity, connection)}, problem)
    here[identity.process] = identity, connection


def _missing(
    address: str, processes: int, me: Identity, here: dict[int, tuple[Identity, Connection]], seconds: float
) -> str:
    missing = [str(i) for i in range(1, processes) if i not in here]
    names = f"process{'es' if len(missing) > 1 else ''} {', '.join(missing[:8])} of {processes}"
    known = ", ".join(map(str, [me, *(identity for identity, _ in here.values())]))
    where = f"to --coordinator={address} within {seconds:g} s"
    return f"{names} did not come {where}; start all of them, with the same address (here: {known})"


def _refuse(here: dict[int, tuple[Identity, Connection]], problem: str) -> None:
    """Tells all who have come, and raises the same."""
    for _, connection in here.values():
        connection.send(refused=problem)
    for _, connection in here.values():
        connection.finish(_FAREWELL)
    raise UserError(problem)


def _listen(host: str, port: int, address: str) -> socket.socket:
    local = host in ("localhost", "127.0.0.1")
    try:
        if not local and socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        return socket.create_server(("127.0.0.1" if local else "", port), backlog=1024)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            mend = f"choose another port, or end what listens there (ss -ltnp 'sport = :{port}')"
            raise UserError(f"--coordinator={address}: port {port} is in use on this machine; {mend}") from None
        raise UserError(f"--coordinator={address}: cannot listen on port {port}: {error.strerror}") from None


def _reach(host: str, port: int, address: str, seconds: float) -> socket.socket:
    end, problem = time.monotonic() + seconds, "no answer"
    while (left := end - time.monotonic()) > 0:
        try:
            return socket.create_connection((host, port), timeout=left)
        except OSError as error:
            problem = error.strerror or str(error)
        time.sleep(min(_POLL, max(left, 0)))
    raise UserError(
        f"--coordinator={address}: not reachable within {seconds:g} s ({problem.lower()}); start process 0 there, and "
        f"let ports {port} and {port + 1} through"
    )


def _free_port(wanted: int) -> int:
    for port in (wanted, 0):
        with contextlib.suppress(OSError, OverflowError), socket.create_server(("", port)) as probe:
            return probe.getsockname()[1]
    raise UserError("no free port is left on this machine for JAX's coordination service")


def gather(address: str, processes: int, me: Identity, seconds: float) -> Meeting:
    """`host_meeting` for process 0, `attend_meeting` for the others."""
    meet: Callable[..., Meeting] = host_meeting if me.process == 0 else attend_meeting
    return meet(address, processes, me, seconds)
