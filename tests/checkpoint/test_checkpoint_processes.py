"""Two real processes that share one checkpoint: each answers for what it wrote, and both restore the same step."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from ml.checkpoint import Checkpointer


def run_two(workdir):
    """Runs the program in two processes of four devices each; returns what each printed, with stdout at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = pathlib.Path(__file__).with_name("process_saver.py")
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(program), str(workdir), str(port), str(process)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        results = [process.communicate(timeout=180) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, results, strict=True):
        assert process.returncode == 0, errors
    return [errors + output for output, errors in results]


def test_two_processes_save_agree_on_what_is_whole_and_one_process_reads_it(tmp_path):
    outputs = run_two(tmp_path)
    assert all("latest=None restored=0" in output.splitlines() for output in outputs), outputs
    folder = tmp_path / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {"2", "3", ".lock"}
    assert {path.name for path in (folder / "3").glob("manifest*")} == {"manifest.json", "manifest.1.json"}

    # Damage that only process 1 looks at: both have to pass the step over.
    (theirs,) = (path for path in (folder / "3/state/ocdbt.process_1/d").iterdir())
    theirs.write_bytes(theirs.read_bytes()[:-1])
    outputs = run_two(tmp_path)
    assert all("latest=3 restored=2" in output.splitlines() for output in outputs), outputs
    assert "checkpoints/3 is not whole" in outputs[0]

    abstract = {"w": jax.ShapeDtypeStruct((16, 4), jnp.float32), "step": jax.ShapeDtypeStruct((), jnp.int32)}
    with Checkpointer(tmp_path) as checkpointer:
        restored = checkpointer.restore(abstract)
        assert restored.step == 5
        np.testing.assert_array_equal(
            np.asarray(restored.state["w"]), np.random.default_rng(5).normal(size=(16, 4)).astype(np.float32)
        )

        # Half of a save of two processes is none.
        (folder / "5/manifest.1.json").unlink()
        assert checkpointer.restore(abstract).step == 4
