"""Each process loads the rows that its devices hold, wherever the mesh has put them, and all agree at the same call."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from training_cases import ragged_batch

from ml.parallel import MeshConfig, Rules, loader_share, make_mesh, place_batch
from ml.parallel.processes.agreement import Agreement


@pytest.fixture(scope="module")
def told():
    """What two real processes print."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    program = pathlib.Path(__file__).with_name("process_batches.py")
    path = os.pathsep.join([str(program.parents[1]), os.environ["PYTHONPATH"]])
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "NPROC": "32", "PYTHONPATH": path}
    processes = [
        subprocess.Popen(
            [sys.executable, str(program), address, str(i)],
            env=os.environ | flags,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        results = [process.communicate(timeout=180) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, results, strict=True):
        assert process.returncode == 0, errors
    return [json.loads(next(line for line in output.splitlines() if line.startswith("{"))) for output, _ in results]


@pytest.mark.parametrize(
    ("case", "first", "second", "count"),
    [
        ("side by side", [0, 1, 2, 3], [4, 5, 6, 7], 8),
        ("in turns", [0, 1, 4, 5], [2, 3, 6, 7], 8),
        ("the same rows for both", [0, 1], [0, 1], 2),
        ("all rows for both", [0], [0], 1),
        ("backwards", [4, 5, 6, 7], [0, 1, 2, 3], 8),
    ],
)
def test_parts_of_two_processes(told, case, first, second, count):
    assert [process["shares"][case] for process in told] == [[first, count], [second, count]]


def test_all_processes_learn_of_a_signal_at_the_same_call(told):
    assert [process["agreed"] for process in told] == [[0, 0, 0, 15, 15, 15, 15]] * 2


def test_one_process_agrees_with_itself_at_once():
    agreement = Agreement(make_mesh(MeshConfig()))
    counter = jax.numpy.int32(3)
    assert [agreement.exchange(number, counter) for number in (0, 15)] == [(0, counter), (15, counter)]


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("degrees", [(8, 1, 1), (2, 4, 1), (2, 2, 2)])
def test_a_batch_on_the_mesh_is_the_batch(degrees, microbatches):
    batch = ragged_batch(16)
    rules = Rules(make_mesh(MeshConfig(*degrees)))
    placed = place_batch(batch, rules, microbatches)
    assert loader_share(rules) == (tuple(range(degrees[0] * degrees[1])), rules.batch_shards)
    for name, x in batch.items():
        np.testing.assert_array_equal(np.asarray(placed[name]).reshape(x.shape), x)
        assert placed[name].dtype == x.dtype
        shard = placed[name].sharding.shard_shape(placed[name].shape)
        assert shard == (microbatches, 16 // microbatches // rules.batch_shards, x.shape[1])


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_columns_are_dealt_to_the_shards_of_the_length(order):
    rules = Rules.make(MeshConfig(2, sequence=4, sequence_order=order))
    batch = ragged_batch(8)
    columns = {"contiguous": np.arange(16), "zigzag": np.array([0, 1, 14, 15, 2, 3, 12, 13, 4, 5, 10, 11, 6, 7, 8, 9])}
    for name, array in place_batch(batch, rules, 2).items():
        whole = batch[name][:, columns[order]].reshape(2, 4, -1)
        for shard in array.addressable_shards:
            assert shard.data.shape == (2, 2, 4)
            np.testing.assert_array_equal(np.asarray(shard.data), whole[shard.index])
