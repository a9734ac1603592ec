"""Signs of life over real connections on the loopback, on a clock of the test's own."""

import signal
import socket
import threading
import time

import jax
import pytest

from ml.errors import UserError
from ml.parallel.processes.connection import Connection
from ml.parallel.processes.health import WatchedProcess
from ml.parallel.processes.meeting import Meeting
from ml.parallel.processes.roll import HealthConfig, Identity

CONFIG = HealthConfig(timeout_seconds=60, stall_seconds=100)
PATIENCE = 60  # seconds after which a test gives up


class Group:
    """Process 0 and two others, all in this process; each notes its verdict instead of ending."""

    def __init__(self):
        self.now, self.verdicts, self.sockets = 0.0, {}, []
        names = [Identity(i, f"h{i}", 100 + i) for i in range(3)]
        links = {}
        for i in (1, 2):
            ends = socket.socketpair()
            self.sockets += ends
            links[i] = [Connection(end) for end in ends]
        meetings = [Meeting(tuple(names), {i: links[i][0] for i in (1, 2)}, 0)]
        meetings += [Meeting((names[0],), {0: links[i][1]}, 0) for i in (1, 2)]
        self.links = links
        self.members = [
            WatchedProcess(meeting, i, CONFIG, clock=lambda: self.now, end=lambda v, i=i: self.verdicts.update({i: v}))
            for i, meeting in enumerate(meetings)
        ]

    def wait_for(self, condition):
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, self.verdicts
            time.sleep(0.01)


@pytest.fixture
def group():
    made = Group()
    yield made
    for one in made.sockets:
        one.close()


def test_a_process_whose_connection_closes_is_named_on_all_others(group):
    group.members[2].at("data", 7)
    group.now = 1.5
    group.wait_for(lambda: group.members[0]._roll._entries[2].report.step == 7)
    group.links[2][1]._socket.shutdown(socket.SHUT_RDWR)  # as when the kernel ends a process
    group.wait_for(lambda: {0, 1} <= group.verdicts.keys())
    assert group.verdicts[0] == group.verdicts[1]
    assert group.verdicts[0].line.startswith("process 2 (host h2, pid 102) died at step 7 (phase data, last heard")
    assert group.verdicts[0].status == 75


def test_the_death_of_process_0_is_noticed_by_all_others(group):
    group.members[0].at("saving", 9)
    group.now = 1.5
    group.wait_for(lambda: all(group.members[i]._roll._entries[0].report.step == 9 for i in (1, 2)))
    group.members[0]._over.set()  # its thread is gone
    for i in (1, 2):
        group.links[i][0]._socket.shutdown(socket.SHUT_RDWR)
    group.wait_for(lambda: {1, 2} <= group.verdicts.keys())
    for i in (1, 2):
        assert group.verdicts[i].line.startswith(
            "process 0 (host h0, pid 100) died at step 9 (phase saving, last heard"
        )


def test_the_stalled_one_is_named_by_process_0(group):
    for i in (0, 2):
        group.members[i].at("data", 3)
        group.members[i].at("step")
    group.members[1].at("data", 3)
    for now in (2.0, 40.0, 80.0, 104.0):
        assert not group.verdicts
        group.now = now
        group.wait_for(
            lambda: group.verdicts or all(e.heard == group.now for e in group.members[0]._roll._entries.values())
        )
    group.wait_for(lambda: len(group.verdicts) == 3)
    assert group.verdicts[2].line.startswith(
        "process 1 (host h1, pid 101) stalled at step 3 (phase data, for 102 s, last"
    )


def test_a_failure_is_told_to_the_others_with_its_status(group):
    with pytest.raises(UserError), group.members[1].failures():
        raise UserError("disk full")
    group.wait_for(lambda: group.members[0]._roll._entries[1].state == "failed")
    group.now = 5.0
    group.wait_for(lambda: {0, 2} <= group.verdicts.keys())
    assert group.verdicts[0].line == "process 1 (host h1, pid 101) failed at step 0 (phase starting): disk full"
    assert group.verdicts[0].status == 2
    assert 1 not in group.verdicts, "it tells its own story"


def test_process_0_waits_until_the_others_know_of_its_failure(group):
    def fail():
        with pytest.raises(ValueError), group.members[0].failures():
            raise ValueError("broken")

    failing = threading.Thread(target=fail)
    failing.start()
    group.wait_for(lambda: group.members[0]._roll._entries[0].state == "failed")
    group.now = 5.0
    failing.join(PATIENCE)
    group.wait_for(lambda: {1, 2} <= group.verdicts.keys())
    assert (
        group.verdicts[1].line == "process 0 (host h0, pid 100) failed at step 0 (phase starting): ValueError: broken"
    )
    assert (group.verdicts[1].status, 0 in group.verdicts) == (1, False)


@pytest.mark.parametrize("cause", [False, True])
def test_an_error_that_another_one_may_have_caused_waits_for_the_verdict(group, cause):
    raised = []

    def fail():
        error = jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer")
        try:
            with group.members[1].failures():
                if cause:
                    raise RuntimeError("saving failed") from error
                raise error
        except RuntimeError:
            raised.append(dict(group.verdicts))

    failing = threading.Thread(target=fail)
    failing.start()
    group.links[2][1]._socket.shutdown(socket.SHUT_RDWR)
    failing.join(PATIENCE)
    assert raised[0][1].line.startswith("process 2 (host h2, pid 102) died"), "the verdict came first"


def test_an_error_of_its_own_does_not_wait(group):
    with pytest.raises(jax.errors.JaxRuntimeError), group.members[1].failures():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
    group.wait_for(lambda: group.members[0]._roll._entries[1].state == "failed")


def test_goodbyes_end_quietly_and_process_0_goes_last(group):
    leaving = [threading.Thread(target=group.members[i].leave) for i in (0, 1, 2)]
    leaving[0].start()
    leaving[1].start()
    leaving[1].join(PATIENCE)
    assert not leaving[1].is_alive() and leaving[0].is_alive(), "process 2 is still at work"
    leaving[2].start()
    for one in leaving:
        one.join(PATIENCE)
        assert not one.is_alive()
    assert not group.verdicts


def test_progress_is_counted_at_every_batch():
    watch = Group().members[0]
    before = watch.report.position
    assert list(watch.over("abc", "evaluating")) == ["a", "b", "c"]
    assert watch.report.position == before + 3
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "no signal is touched"
