"""`scripts/tune_kernels.py`: the best candidate that works is kept, whatever the others do."""

import json
import os
import subprocess
import sys

import jax
import pytest

from pallas_kernels.tuning import overlay, read, tuned
from pallas_kernels.tuning.space import all_spaces

# Put in place of the packages' own, in every process: one candidate is slow, one raises, one crashes, one hangs.
_SPACES = """
import os, time
import pallas_kernels.tuning.space as space

def make(config):
    import jax.numpy as jnp
    kind = config["kind"]
    if kind == "raises":
        raise NotImplementedError("no such layout")
    if kind == "crashes":
        os._exit(9)
    if kind == "hangs":
        time.sleep(600)
    size = {"fast": 64, "slow": 1024}[kind]
    return lambda x: x @ x, [(jnp.ones((size, size)),)]

def all_spaces(platform):
    assert platform == "cpu"
    for length in (100, 300):
        kinds = ["slow", "raises", "crashes", *(["hangs"] if length == 100 else []), "fast"]
        yield space.Space("toy", "float32", {"length": length}, [{"kind": kind} for kind in kinds], make)
    yield space.Space("other", "float32", {}, [{}], make)

space.all_spaces = all_spaces
"""


def tune(tmp_path, *arguments):
    (tmp_path / "sitecustomize.py").write_text(_SPACES)
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    command = [sys.executable, "scripts/tune_kernels.py", f"--output={tmp_path / 'tables'}", *arguments]
    environment = os.environ | {"PYTHONPATH": path, "XLA_FLAGS": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_fastest_that_works_is_kept(tmp_path):
    done = tune(tmp_path, "--kernel=toy", "--timeout=45", "--rounds=2")
    assert done.returncode == 0, done.stderr
    assert '{"kind": "raises"}: NotImplementedError: no such layout' in done.stdout
    assert '{"kind": "crashes"}: the process ended with status 9' in done.stdout
    assert '{"kind": "hangs"}: no result in 45 s' in done.stdout
    table = tmp_path / "tables/toy.json"
    first, second = read(table)
    assert (first.shape, second.shape) == ({"length": 64}, {"length": 256})
    for entry in (first, second):
        assert entry.config == {"kind": "fast"} and entry.seconds and entry.seconds > 0
        assert (entry.chip, entry.dtype, entry.versions["jax"]) == ("cpu", "float32", jax.__version__)
    with overlay(table):
        assert tuned("toy", "cpu", "float32", length=300) == {"kind": "fast"}


@pytest.mark.parametrize(
    ("kernel", "message"),
    [("toi", "error: --kernel=toi: nothing to tune on cpu; there is: other, toy")],
)
def test_mistakes(tmp_path, kernel, message):
    done = tune(tmp_path, f"--kernel={kernel}")
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == message
    assert not (tmp_path / "tables").exists()


def test_what_can_be_tuned_is_named_as_its_table_wants_it():
    for platform in ("cpu", "gpu", "tpu"):
        for space in all_spaces(platform):
            assert space.candidates and json.loads(json.dumps(list(space.candidates)))
            assert all(isinstance(size, int | str) for size in space.shape.values())
