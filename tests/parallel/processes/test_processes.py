"""Two real processes of four devices each train as one process of eight does, and name one another when one is lost."""

import contextlib
import json
import os
import re
import signal
import socket

import jax
import numpy as np
import pytest
from script_processes import run, start
from training_cases import write_config

from ml.checkpoint import restore_params

STEPS = 6
# NPROC is the size of XLA's thread pool: collective operations of emulated devices each hold a thread while they wait.
FOUR_DEVICES = """
import os, jax
jax.config.update("jax_disable_most_optimizations", True)
os.environ |= {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "NPROC": "32"}
"""
EIGHT_DEVICES = FOUR_DEVICES.replace("4", "8")
# These steps take milliseconds, too short a time to send a signal in.
SLOWLY = """
import time, ml.train.loop as loop
place = loop.place_batch
loop.place_batch = lambda *arguments: time.sleep(0.2) or place(*arguments)
"""
TIMING = ("tokens_per_second", "mfu")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("config"))


def arguments(config, workdir, *more):
    flags = {
        "train.steps": STEPS,
        "train.batch_size": 16,
        "train.microbatches": 2,
        "schedule.kind": "constant",  # its rate does not depend on how many steps are still to come
        "optimizer.clip_norm": 0.5,
        "checkpoint.every": 3,
        "eval.every": 4,
        "health.start_seconds": 100,
    }
    fixed = (f"--config.{key}={value}" for key, value in flags.items())
    return ["train.py", f"--config={config}", f"--workdir={workdir}", *fixed, *more]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def pair(config, workdir, *more, before=""):
    """Two processes; whatever is left of them is killed at the end."""
    common = [*arguments(config, workdir, *more), f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2"]
    running = [start(*common, f"--process_id={i}", before=FOUR_DEVICES + before) for i in range(2)]
    try:
        yield running
    finally:
        for one in running:
            one.kill()


def run_pair(config, workdir, *more):
    with pair(config, workdir, *more) as running:
        for one in running:
            assert one.wait().returncode == 0, one.stderr
        return running


def rows(workdir):
    path = workdir / "metrics.jsonl"
    whole = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
    return [{key: value for key, value in json.loads(row).items() if key not in TIMING} for row in whole]


def assert_same_course(workdir, expected, step=STEPS):
    got, wanted = rows(workdir), rows(expected)
    assert [row["step"] for row in wanted] == list(range(1, step + 1)), "each step once, in order"
    assert [row.keys() for row in got] == [row.keys() for row in wanted]
    for key in ("tokens", "tokens_seen", "skipped", "learning_rate"):
        assert [row[key] for row in got] == [row[key] for row in wanted], key
    for key in ("loss", "gradient_norm", "parameter_norm", "eval_loss"):
        values = [[row[key] for row in each if key in row] for each in (got, wanted)]
        np.testing.assert_allclose(*values, rtol=1e-5, err_msg=key)
    for part in ("params", "opt_state"):
        a, b = (restore_params(folder, step, subtree=part)[1] for folder in (workdir, expected))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)
    manifests = [
        json.loads((folder / "checkpoints" / str(step) / "manifest.json").read_text()) for folder in (workdir, expected)
    ]
    assert manifests[0]["data_state"] == manifests[1]["data_state"]


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """The run of one process."""
    workdir = tmp_path_factory.mktemp("runs") / "alone"
    done = run(*arguments(config, workdir), before=EIGHT_DEVICES)
    assert done.returncode == 0, done.stderr
    return workdir


def test_two_processes_train_as_one_does(config, alone, tmp_path):
    """The batch spans the processes; halfway both stop, and go on."""
    first = run_pair(config, tmp_path / "w", "--config.train.steps=3")
    assert "step 3/3" in first[0].stderr and "gzip -9" in first[0].stderr
    built = ("trained a tokenizer", "config.data.sources[0]: ")  # told by the one of the two that did it
    for line in built:
        assert sum(one.stderr.count(line) for one in first) == 1
    others = [line for line in first[1].stderr.splitlines() if not line.startswith(("[Gloo]", *built))]
    assert not others, "only process 0 tells"
    again = run_pair(config, tmp_path / "w")
    assert "going on from the checkpoint of step 3" in again[0].stderr
    assert_same_course(tmp_path / "w", alone)


@pytest.mark.slow
def test_sharded_parameters_span_the_processes_and_one_process_goes_on(config, alone, tmp_path):
    run_pair(config, tmp_path / "w", "--config.train.steps=3", "--config.mesh.data=1", "--config.mesh.fsdp=8")
    one = run(*arguments(config, tmp_path / "w"), before=EIGHT_DEVICES)
    assert one.returncode == 0 and "going on from the checkpoint of step 3" in one.stderr, one.stderr
    assert_same_course(tmp_path / "w", alone)


NAME = r"process {process} \(host [^ ]+, pid {pid}\)"


# As if the interpreter had been busy when it happened: the name must come although JAX could have noticed before.
BUSY = """
import time, ml.parallel.processes.health as health
attend = health.WatchedProcess.attend
health.WatchedProcess.attend = lambda self: time.sleep(0.5) or attend(self)
"""


@pytest.mark.sweep("1-9-died")
@pytest.mark.parametrize(
    ("victim", "number", "how"),
    [
        (0, signal.SIGKILL, "died"),
        (1, signal.SIGKILL, "died"),
        (1, signal.SIGSTOP, "does not answer: it died or hangs"),
        pytest.param(0, signal.SIGSTOP, "does not answer: it died or hangs", marks=pytest.mark.slow),
    ],
)
def test_a_lost_process_is_named_by_the_other(config, tmp_path, victim, number, how):
    health = ("--config.train.steps=1000", "--config.health.timeout_seconds=3")
    with pair(config, tmp_path / "w", *health, before=SLOWLY + BUSY) as running:
        running[0].wait_until(lambda: len(rows(tmp_path / "w")) >= 4)
        lost, other = running[victim], running[1 - victim]
        os.kill(lost.pid, number)
        other.wait()
    assert other.returncode == 75, other.stderr
    name = NAME.format(process=victim, pid=lost.pid)
    place = r"at step \d+ \(phase (data|step|saving|evaluating), last heard \d+ s ago\)"
    line = rf"error: {name} {how} {place}; restart the job: it goes on from the newest whole checkpoint"
    assert re.fullmatch(line, other.stderr.splitlines()[-1]), other.stderr
    assert "Traceback" not in other.stderr and "Check failure" not in other.stderr


@pytest.mark.slow
def test_a_mistake_of_one_ends_both_and_is_told_by_both(config, tmp_path):
    """Process 1 alone cannot read its data."""
    fails = """
from ml.errors import UserError
import jax, ml.train.loop as loop
place, calls = loop.place_batch, []
def fail(*arguments):
    calls.append(1)
    if len(calls) == 3 and jax.process_index() == 1:
        raise UserError("the disk is full")
    return place(*arguments)
loop.place_batch = fail
"""
    with pair(config, tmp_path / "w", before=fails) as running:
        assert [one.wait().returncode for one in running] == [2, 2], [one.stderr for one in running]
    assert running[1].stderr.splitlines()[-1] == "error: the disk is full"
    name = NAME.format(process=1, pid=running[1].pid)
    told = rf"error: {name} failed at step 3 \(phase data\): the disk is full"
    assert re.fullmatch(told, running[0].stderr.splitlines()[-1]), running[0].stderr


def test_a_folder_that_is_not_shared_is_named(config, tmp_path):
    """Each process has a disk of its own."""
    own = f"""
import ml.train.workdir, pathlib, sys
ml.train.workdir._VISIBLE_SECONDS = 0.5
before = ml.train.workdir.Workdir.__init__
def init(self, path):
    before(self, pathlib.Path({str(tmp_path)!r}, sys.argv[-1].removeprefix("--")))
ml.train.workdir.Workdir.__init__ = init
"""
    with pair(config, tmp_path / "w", before=own) as running:
        assert [one.wait().returncode for one in running] == [2, 2], [one.stderr for one in running]
    for one in running:
        assert "is not the same folder on all machines: process 1 does not see what process 0" in one.stderr


@pytest.mark.slow
def test_a_signal_to_one_stops_both_after_the_same_step(config, alone, tmp_path):
    with pair(config, tmp_path / "w", before=SLOWLY) as running:
        running[0].wait_until(lambda: len(rows(tmp_path / "w")) >= 2)
        os.kill(running[1].pid, signal.SIGTERM)
        assert [one.wait().returncode for one in running] == [0, 0], [one.stderr for one in running]
    stopped = len(rows(tmp_path / "w"))
    assert 2 <= stopped < STEPS and (tmp_path / "w" / "checkpoints" / str(stopped)).is_dir()
    assert f"saved at step {stopped}; run the same command again to go on" in running[0].stderr
    one = run(*arguments(config, tmp_path / "w"), before=EIGHT_DEVICES)
    assert one.returncode == 0, one.stderr
    assert_same_course(tmp_path / "w", alone)
