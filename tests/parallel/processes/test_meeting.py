"""How processes find one another, and every way in which they cannot, by name."""

import re
import socket
import threading

import pytest

from ml.errors import UserError
from ml.parallel.processes.launch import Launch, detect_launch, find_launch, launch_by_hand
from ml.parallel.processes.meeting import gather, split_address
from ml.parallel.processes.relay import Relay
from ml.parallel.processes.roll import Identity


@pytest.fixture
def address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def meet(address, *members, seconds=20.0):
    """Each member, (number, count that it was told), in a thread; returns what each got or raised."""
    outcomes = {}

    def attend(key, process, count):
        try:
            outcomes[key] = gather(address, count, Identity(process, f"h{process}", 100 + key), seconds)
        except UserError as error:
            outcomes[key] = str(error)

    threads = [threading.Thread(target=attend, args=(key, *member)) for key, member in enumerate(members)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for outcome in outcomes.values():
        for connection in getattr(outcome, "connections", {}).values():
            connection.close()
    return [outcomes[key] for key in range(len(members))]


def test_all_come(address):
    hub, one, two = meet(address, (0, 3), (1, 3), (2, 3))
    assert [str(identity) for identity in hub.identities] == [f"process {i} (host h{i}, pid 10{i})" for i in range(3)]
    assert one.identities == two.identities == hub.identities[:1]
    assert hub.service_port == one.service_port == two.service_port != split_address(address)[1]
    assert list(hub.connections) == [1, 2] and list(one.connections) == [0]


def test_one_does_not_come(address):
    hub, one = meet(address, (0, 3), (1, 3), seconds=1.0)
    here = "process 0 (host h0, pid 100), process 1 (host h1, pid 101)"
    place = f"to --coordinator={address} within 1 s"
    assert hub == f"process 2 of 3 did not come {place}; start all of them, with the same address (here: {here})"
    assert one == hub


@pytest.mark.parametrize(
    ("member", "problem"),
    [
        (
            (1, 4),
            r"--num_processes=4 for process 1 \(host h1, pid 101\), but 3 for process 0 .*; give all the same number",
        ),
        ((0, 3), None),
    ],
)
def test_who_was_told_otherwise_is_named_on_all(address, member, problem):
    outcomes = meet(address, (0, 3), member, seconds=3.0)
    if problem is None:  # two that take themselves for process 0: the port tells
        assert any("is in use on this machine; choose another port" in outcome for outcome in outcomes)
    else:
        assert all(re.match(problem, outcome) for outcome in outcomes), outcomes


def test_a_number_that_was_given_twice(address):
    outcomes = meet(address, (0, 4), (1, 4), (1, 4))
    assert all(
        re.match(r"--process_id=1 was given to process 1 .* and to process 1 .*; give each", o) for o in outcomes
    )


def test_no_one_listens(address):
    (outcome,) = meet(address, (1, 2), seconds=0.3)
    port = split_address(address)[1]
    mend = f"start process 0 there, and let ports {port} and {port + 1} through"
    assert outcome == f"--coordinator={address}: not reachable within 0.3 s (connection refused); {mend}"


def test_a_stranger_is_sent_away(address):
    host, port = split_address(address)

    def knock():
        for text in (b"GET / HTTP/1.1\r\n\r\n", b'{"hello": 1}\n', b'["hello"]\n'):
            while True:
                try:
                    with socket.create_connection((host, port), timeout=20) as stranger:
                        stranger.sendall(text)
                        assert stranger.recv(100) == b""
                    break
                except ConnectionRefusedError:
                    continue
                except ConnectionResetError:
                    break

    knocking = threading.Thread(target=knock)
    knocking.start()
    waiting = threading.Thread(target=knocking.join)
    waiting.start()
    outcomes = {}
    hub = threading.Thread(target=lambda: outcomes.update(hub=meet(address, (0, 2))[0]))
    hub.start()
    waiting.join(60)
    (member,) = meet(address, (1, 2))
    hub.join(60)
    assert outcomes["hub"].identities[1].process == 1 and member.identities[0].process == 0


@pytest.mark.parametrize("text", ["nowhere", "host:", ":1", "host:99999", "host:port"])
def test_an_address_must_be_one(text):
    with pytest.raises(UserError, match=f"--coordinator={text} must be HOST:PORT"):
        split_address(text)


def test_flags():
    assert launch_by_hand(None, None, None) is None
    assert launch_by_hand("h:1", 1, 0) is None, "one process is a single process"
    assert launch_by_hand("h:1", 2, 1) == Launch("h:1", 2, 1)
    with pytest.raises(UserError, match=r"^--process_id=1 without --coordinator and --num_processes; give all three"):
        launch_by_hand(None, None, 1)
    with pytest.raises(UserError, match=r"--process_id=2 must lie in \[0, 2\)"):
        launch_by_hand("h:1", 2, 2)


def test_surroundings(monkeypatch):
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("jax._src.cloud_tpu_init.running_in_cloud_tpu_vm", False)
    assert detect_launch(1.0) is None
    with pytest.raises(UserError, match=r"--distributed=on: neither SLURM, MPI, GKE nor a TPU pod was found"):
        find_launch("on", None, None, None, 1.0)
    slurm = {
        "JOB_ID": "7",
        "STEP_NODELIST": "n[3-4]",
        "NTASKS": "2",
        "PROCID": "1",
        "LOCALID": "0",
        "STEP_NUM_NODES": "2",
    }
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    found = find_launch("auto", None, None, None, 1.0)
    assert (found.num_processes, found.process_id, found.coordinator.split(":")[0]) == (2, 1, "n3")
    assert find_launch("off", None, None, None, 1.0) is None
    assert find_launch("auto", "h:1", 3, 2, 1.0) == Launch("h:1", 3, 2), "flags come first"
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert find_launch("auto", None, None, None, 1.0) is None


def test_a_relay_passes_on_and_outlives_the_service():
    with socket.create_server(("127.0.0.1", 0)) as service:
        relay = Relay("127.0.0.1", service.getsockname()[1], 20.0)
        host, port = split_address(relay.address)
        with socket.create_connection((host, port), timeout=20) as client:
            server, _ = service.accept()
            with server:
                client.sendall(b"ask")
                assert server.recv(10) == b"ask"
                server.sendall(b"answer")
                assert client.recv(10) == b"answer"
            # The service has closed: the client must not see that.
            client.settimeout(0.5)
            with pytest.raises(TimeoutError):
                client.recv(10)
            client.sendall(b"still there?")
