"""A run that was killed, at any moment and any number of times, ends bit for bit where an undisturbed run ends."""

import json
import os
import random
import signal
import time

import jax
import numpy as np
import pytest
from script_processes import run, start
from training_cases import experiment, write_config

from ml.checkpoint import restore_params
from ml.train.loop import train

STEPS = 16
SAVES_ALL_THE_TIME = "--config.checkpoint.every=1"
# These steps take a millisecond, too short a time to send a signal in.
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
    """Of a run that saves only at its end, unless told otherwise."""
    flags = {
        "train.steps": STEPS,
        "train.ema": 0.9,
        "train.noise_scale": "true",  # its moving averages are part of what goes on
        "optimizer.clip_norm": 0.5,
        "schedule.kind": "constant",  # its rate does not depend on how many steps are still to come
        "checkpoint.every": 1000,
    }
    fixed = (f"--config.{key}={value}" for key, value in flags.items())
    return ["train.py", f"--config={config}", f"--workdir={workdir}", *fixed, *more]


def rows(workdir):
    """All rows of the metrics but for what a clock wrote; a row that is being written is not there yet."""
    path = workdir / "metrics.jsonl"
    whole = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
    return [{key: value for key, value in json.loads(row).items() if key not in TIMING} for row in whole]


def outcome(workdir, step=STEPS):
    """Everything that a run leaves and that the next step depends on."""
    state = {part: restore_params(workdir, step, subtree=part) for part in ("params", "ema", "opt_state")}
    manifest = json.loads(next((workdir / "checkpoints" / str(step)).glob("manifest*.json")).read_text())
    return jax.tree.map(np.asarray, state), manifest["data_state"], rows(workdir)


def assert_same(got, expected):
    (state, data_state, metrics), (expected_state, expected_data_state, expected_metrics) = got, expected
    assert jax.tree.structure(state) == jax.tree.structure(expected_state)
    for (path, a), b in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(expected_state), strict=True):
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), jax.tree_util.keystr(path)
    assert data_state == expected_data_state
    assert [row["step"] for row in metrics] == list(range(1, STEPS + 1)), "each step exactly once, in order"
    assert metrics == expected_metrics


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    done = run(*arguments(config, workdir))
    assert done.returncode == 0, done.stderr
    return outcome(workdir)


def being_saved(workdir):
    """Whether a save is under way, or was cut off."""
    folder = workdir / "checkpoints"
    return folder.is_dir() and any("." in entry.name[1:] for entry in folder.iterdir())


def kill_at_a_random_moment(running, workdir, moments):
    time.sleep(moments.uniform(0.0, 0.5))  # a step and its save take about half of that


def kill_during_a_save(running, workdir, moments):
    while not running.ended:
        if being_saved(workdir):
            os.kill(running.pid, signal.SIGSTOP)
            if being_saved(workdir):
                return
            os.kill(running.pid, signal.SIGCONT)  # just too late: the next save will do
        time.sleep(0.002)


def kill_again_and_again(config, workdir, kills, seed):
    """Kills -9, then lets a last start finish; returns how many runs were killed, and how many while they saved."""
    moments, killed, cut_off = random.Random(seed), 0, 0
    for kill in range(kills):
        wanted = len(rows(workdir)) + moments.randint(1, 2)
        running = start(*arguments(config, workdir, SAVES_ALL_THE_TIME))
        running.wait_until(lambda wanted=wanted: len(rows(workdir)) >= wanted)
        (kill_during_a_save if kill % 2 else kill_at_a_random_moment)(running, workdir, moments)
        status = running.kill(signal.SIGKILL).returncode
        assert status in (0, -signal.SIGKILL), running.stderr  # 0: it was faster than this loop
        killed += status != 0
        cut_off += being_saved(workdir)
    last = run(*arguments(config, workdir, SAVES_ALL_THE_TIME))
    assert last.returncode == 0, last.stderr
    assert "going on from the checkpoint of step" in last.stderr
    return killed, cut_off


@pytest.mark.slow
def test_kill_9_at_random_moments(config, undisturbed, tmp_path):
    killed, cut_off = kill_again_and_again(config, tmp_path / "w", 4, seed=0)
    assert_same(outcome(tmp_path / "w"), undisturbed)
    assert killed >= 2 and cut_off >= 1, "this proves less than it claims"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_kill_9_at_many_random_moments(config, undisturbed, tmp_path, seed):
    kill_again_and_again(config, tmp_path / "w", 6, seed)
    assert_same(outcome(tmp_path / "w"), undisturbed)


@pytest.mark.sweep("2-130")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_polite_signal_saves_and_the_next_start_goes_on(config, undisturbed, tmp_path, number, status):
    workdir = tmp_path / "w"
    running = start(*arguments(config, workdir), before=SLOWLY)
    running.wait_until(lambda: len(rows(workdir)) >= 2)
    assert running.kill(number).returncode == status, running.stderr
    stopped = len(rows(workdir))
    assert 2 <= stopped < STEPS and (workdir / "checkpoints" / str(stopped)).is_dir()
    assert running.stderr.splitlines()[-1] == f"saved at step {stopped}; run the same command again to go on"
    again = run(*arguments(config, workdir))
    assert again.returncode == 0 and f"going on from the checkpoint of step {stopped}" in again.stderr
    assert_same(outcome(workdir), undisturbed)


@pytest.mark.slow
def test_a_longer_run_is_a_shorter_one_continued(config, undisturbed, tmp_path):
    for steps in (STEPS // 2, STEPS):
        done = run(*arguments(config, tmp_path / "w", f"--config.train.steps={steps}"))
        assert done.returncode == 0, done.stderr
    assert f"changed since the last start: config.train.steps: {STEPS // 2} -> {STEPS}" in done.stderr
    assert_same(outcome(tmp_path / "w"), undisturbed)


def test_on_another_mesh_and_with_other_workers(tmp_path, quick_compilation):
    corpus = write_config(tmp_path).parent / "corpus.jsonl"

    def go_on(name, steps, **changes):
        common = {"schedule__kind": "constant", "train__microbatches": 1, "train__steps": steps}
        train(experiment(corpus, **common, **changes), tmp_path / name)

    go_on("straight", 6)  # 8 x 1: `mesh.data` takes all devices
    go_on("moved", 3)
    go_on("moved", 6, mesh__data=2, mesh__fsdp=4, data__num_workers=1)
    straight, moved = rows(tmp_path / "straight"), rows(tmp_path / "moved")
    assert [row["tokens"] for row in moved] == [row["tokens"] for row in straight]
    for key in ("loss", "gradient_norm", "parameter_norm"):
        np.testing.assert_allclose([row[key] for row in moved], [row[key] for row in straight], rtol=1e-5)
    for part in ("params", "opt_state"):
        a, b = (restore_params(tmp_path / name, 6, subtree=part)[1] for name in ("straight", "moved"))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5), a, b)
