"""Program of ``test_checkpoint_kill.py``: children check what is left, save without a pause and are killed.

The imports are done once and the children forked, so that a kill costs a fraction of a second.
"""

import os
import pathlib
import random
import signal
import sys
import time
import traceback

import jax
import jax.numpy as jnp
import numpy as np

from ml.checkpoint import CheckpointConfig, Checkpointer

CONFIG = CheckpointConfig(every=1, keep=2)


def state_of(step: int):
    """Several leaves of about 2 MB in all, a different value in each for each step."""
    random_bits = np.random.default_rng(step)
    leaves = {f"leaf{i}": jnp.asarray(random_bits.normal(size=(1 << 16,)), jnp.float32) for i in range(8)}
    return {"params": leaves, "step": jnp.int32(step)}


def abstract_state():
    return jax.eval_shape(lambda: {"params": {f"leaf{i}": jnp.zeros(1 << 16) for i in range(8)}, "step": jnp.int32(0)})


def check_then_save(workdir: pathlib.Path, report) -> None:
    """Restores as a new run would, compares every bit, and goes on saving until it is killed."""
    with Checkpointer(workdir, CONFIG) as checkpointer:
        left = {entry.name for entry in (workdir / "checkpoints").iterdir() if not entry.name.isdigit()}
        assert left <= {".lock"}, left
        step = 0
        if checkpointer.latest_step() is not None:
            restored = checkpointer.restore(abstract_state())
            step = restored.step
            assert not list((workdir / "checkpoints").glob("*.damaged")), "the newest was not whole"
            for got, expected in zip(jax.tree.leaves(restored.state), jax.tree.leaves(state_of(step)), strict=True):
                assert np.asarray(got).tobytes() == np.asarray(expected).tobytes()
            assert restored.data_state == {"next": step + 1}
        report("restored", step)
        while True:
            step += 1
            checkpointer.save(step, state_of(step), {"next": step + 1})
            report("whole", step - 1)  # a save begins when the one before it is complete


def fork(function, workdir: pathlib.Path) -> tuple[int, int]:
    """Runs ``function`` in a child; returns its process id and a pipe of the lines that it reports."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            function(workdir, lambda word, step: os.write(write_end, f"{word} {step}\n".encode()))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(write_end)
    return child, read_end


def read_reports(pipe: int, count: int | None = None) -> list[tuple[int, float]]:
    """Reads (step, time of arrival) of the next ``count`` reports, or of all to the end."""
    reports, rest = [], b""
    while count is None or len(reports) < count:
        chunk = os.read(pipe, 4096)
        if not chunk:
            break
        *lines, rest = (rest + chunk).split(b"\n")
        reports += [(int(line.split()[1]), time.monotonic()) for line in lines]
    return reports


def main() -> None:
    workdir, kills = pathlib.Path(sys.argv[1]), int(sys.argv[2])
    moments = random.Random(0)
    newest, cut_off, pause = 0, 0, 0.1
    for kill in range(kills + 1):  # the last child only checks what the last kill left
        child, pipe = fork(check_then_save, workdir)
        reports = read_reports(pipe, count=moments.choice((1, 2, 3)) if kill < kills else 1)
        if len(reports) > 2:
            pause = reports[-1][1] - reports[-2][1]  # what one save takes on this machine just now
        if kill < kills:
            time.sleep(moments.uniform(0.0, 2 * pause))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert reports and os.WIFSIGNALED(status), f"kill {kill}: what was left is not as it was saved"
        assert reports[0][0] >= newest, f"kill {kill}: step {newest} was whole, but {reports[0][0]} was restored"
        newest = max(step for step, _ in reports + read_reports(pipe))
        os.close(pipe)
        cut_off += kill < kills and any("." in entry.name[1:] for entry in (workdir / "checkpoints").iterdir())
    print(f"kills={kills} cut_off={cut_off} steps={newest}")


if __name__ == "__main__":
    main()
