"""The verdicts, on a clock of the test's own: who is dead, who is stalled, and who is only slow."""

import pytest

from ml.errors import UserError
from ml.parallel.processes.roll import HealthConfig, Identity, Report, Roll

CONFIG = HealthConfig(timeout_seconds=60, stall_seconds=600, slow_seconds=3600)
END = "; restart the job: it goes on from the newest whole checkpoint"


def roll(count=3, config=CONFIG):
    return Roll(config, [Identity(i, f"h{i}", 100 + i) for i in range(count)], 0.0)


def all_heard(one, now, reports, but=()):
    for process, report in enumerate(reports):
        if process not in but:
            one.heard(process, Report(*report), now)


def test_nothing_is_wrong():
    one = roll()
    for now in range(0, 10_000, 10):
        all_heard(one, now, [(now, "step", now)] * 3)
        assert one.verdict(now) is None


def test_a_closed_connection_is_a_death_unless_there_was_a_goodbye():
    one = roll()
    all_heard(one, 95.0, [(119, "data", 240), (120, "data", 241), (120, "step", 242)])
    one.done(0)
    one.closed(0)
    assert one.verdict(100.0) is None
    one.closed(1)
    verdict = one.verdict(126.0)
    assert verdict.line == "process 1 (host h1, pid 101) died at step 120 (phase data, last heard 31 s ago)" + END
    assert verdict.status == 75


def test_silence_is_a_death_after_the_timeout():
    one = roll()
    all_heard(one, 10.0, [(7, "step", 20)] * 3)
    for now in range(11, 71):
        all_heard(one, now, [(7, "step", 20)] * 3, but=[2])
        assert one.verdict(float(now)) is None
    verdict = one.verdict(70.5)
    assert verdict.line.startswith(
        "process 2 (host h2, pid 102) does not answer: it died or hangs at step 7 (phase step,"
    )


def test_the_one_that_is_behind_is_the_suspect():
    one = roll()
    reports = [(8, "step", 24), (8, "data", 23), (8, "step", 24)]
    for now in range(601):
        all_heard(one, now, reports)
        assert one.verdict(float(now)) is None
    all_heard(one, 601.0, reports)
    verdict = one.verdict(601.0)
    assert verdict.line == (
        "process 1 (host h1, pid 101) stalled at step 8 (phase data, for 601 s, last heard 0 s ago) "
        "while the others wait for it" + END
    )
    all_heard(one, 602.0, [reports[0], (8, "step", 24), reports[2]])
    assert one.verdict(602.0) is None, "it moves again"


def test_several_behind():
    one = roll(4)
    for now in (0.0, 700.0):
        all_heard(one, now, [(8, "data", 23), (8, "step", 24), (8, "data", 23), (8, "step", 24)])
    assert one.verdict(700.0).line.startswith("process 0 (host h0, pid 100), and with it 1 more, stalled at step 8")


def test_the_wait_counts_from_when_the_last_of_them_came():
    one = roll(2)
    one.heard(0, Report(3, "step", 9), 0.0)
    one.heard(1, Report(3, "step", 9), 500.0)
    one.heard(0, Report(3, "step", 9), 700.0)
    one.heard(1, Report(3, "step", 9), 1050.0)
    one.heard(0, Report(3, "step", 9), 1050.0)
    assert one.verdict(1050.0) is None
    all_heard(one, 1101.0, [(3, "step", 9)] * 2)
    assert one.verdict(1101.0).line.startswith(
        "every process hangs at step 3 (phase step, for 601 s): a device, or the"
    )


@pytest.mark.parametrize(
    ("phase", "limit"),
    [("compiling", 3600), ("restoring", 3600), ("saving", 3600), ("evaluating", 3600), ("data", 600), ("step", 600)],
)
def test_some_phases_may_take_long(phase, limit):
    one = roll(2)
    reports = [(1, phase, 3), (1, "step", 4)]
    all_heard(one, 0.0, reports)
    all_heard(one, float(limit), reports)
    assert one.verdict(float(limit)) is None
    all_heard(one, limit + 1.0, reports)
    assert one.verdict(limit + 1.0).line.startswith("process 0 ")


def test_preparing_data_may_take_for_ever():
    one = roll(2)
    for now in (0.0, 1e6):
        all_heard(one, now, [(0, "preparing data", 1), (0, "restoring", 2)])
    assert one.verdict(1e6) is None


def test_a_failure_is_told_with_its_status_after_a_moment():
    one = roll()
    one.heard(1, Report(5, "saving", 30), 9.0)
    one.failed(1, 2, "disk full", 10.0)
    one.closed(1)
    assert one.verdict(11.0) is None, "the others may fail for the same reason, and tell it themselves"
    verdict = one.verdict(12.0)
    assert (verdict.line, verdict.status) == (
        "process 1 (host h1, pid 101) failed at step 5 (phase saving): disk full",
        2,
    )


def test_the_limits_must_make_sense():
    with pytest.raises(ValueError, match="timeout_seconds=0 must be positive"):
        HealthConfig(timeout_seconds=0)
    with pytest.raises(UserError, match=r"config.health.slow_seconds=1 is shorter than stall_seconds=600"):
        HealthConfig(slow_seconds=1)
