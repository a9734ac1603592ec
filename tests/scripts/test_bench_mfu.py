"""`scripts/bench_mfu.py`: what it reports, what it goes on after, and what it may import."""

import json

import jax
import pytest
from script_processes import error_of, run

from ml.models import TransformerConfig
from ml.models.cost import parameter_count, train_flops_per_token
from ml.train.state import init_state

# Imported by other scripts, absent where only JAX, Flax, Optax, Orbax and Grain are.
_ABSENT = ("ml_collections", "matplotlib", "pyarrow", "tensorboardX", "safetensors")


@pytest.fixture(scope="module")
def script(pytestconfig):
    """The script as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(pytestconfig.rootpath / "scripts")
        import bench_mfu

        return bench_mfu


@pytest.mark.slow
def test_a_setting_that_fails_is_reported_and_the_next_one_measured(tmp_path, script):
    blocked = tmp_path / "sitecustomize.py"
    blocked.write_text(f"import sys\nfor name in {_ABSENT}:\n    sys.modules[name] = None\n")
    settings = [{"attention": "cudnn"}, {"microbatches": 2, "documents": 2, "loss_chunk": 16}]
    path = f"import os; os.environ['PYTHONPATH'] = {str(tmp_path)!r} + os.pathsep + os.environ['PYTHONPATH']"
    output = tmp_path / "results" / "mfu.json"
    arguments = ("--size=tiny", "--steps=2", f"--output={output}", f"--settings={json.dumps(settings)}")
    done = run("bench_mfu.py", *arguments, "--batch_size=4", "--optimizer=adamw", before=path)
    assert done.returncode == 0, done.stderr
    document = json.loads(output.read_text())
    assert document["command"].startswith("python scripts/bench_mfu.py --size=tiny --steps=2 ")
    assert document["versions"]["jax"] == jax.__version__ and "cpu" in document["device"]
    failed, result = document["results"]
    assert "cuDNN takes bfloat16" in failed["error"]
    assert (result["setting"]["batch_size"], result["setting"]["optimizer"]) == (4, "adamw")

    config = TransformerConfig(**script.SIZES["tiny"])
    assert result["parameters"] == parameter_count(config).total
    assert result["flops_per_token"] == train_flops_per_token(config, 16), "two documents in rows of 32"
    assert result["tokens_per_second"] == pytest.approx(4 * 32 / result["seconds_per_step"])
    achieved = result["tokens_per_second"] * result["flops_per_token"]
    assert result["mfu_of_matmul"] == pytest.approx(achieved / result["matmul_flops"])
    assert result["memory"]["params"] == 4 * result["parameters"]
    assert 4 < result["loss"] < 6, "random tokens, of 128 kinds: near log(128)"


def test_what_is_compiled_for_is_placed_as_what_runs_would_be(script):
    program = script.make_program("tiny", script.Setting(batch_size=16, microbatches=2), jax.devices(), "float32")
    state, batch = program.state, program.batch
    with jax.set_mesh(program.rules.mesh):
        real = init_state(program.model, program.tx, program.rules, seed=0, ema=False)
    assert jax.tree.structure(state) == jax.tree.structure(real)
    for planned, array in zip(jax.tree.leaves(state), jax.tree.leaves(real), strict=True):
        assert (planned.shape, planned.dtype) == (array.shape, array.dtype)
        assert planned.sharding.is_equivalent_to(array.sharding, array.ndim)
    kernel = state.params["layers"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape)[1] == kernel.shape[1] // len(jax.devices())
    assert batch["segment_ids"] is None and batch["tokens"].shape == (2, 8, 32)


def test_documents_restart_positions_and_hide_their_last_target(script):
    config = TransformerConfig(**script.SIZES["tiny"])
    batch = script.random_batch(config, script.Setting(batch_size=3, documents=4), 0)
    assert batch["positions"].max() == 7 and batch["segment_ids"].max() == 4
    assert (batch["loss_mask"] == 0).sum() == 3 * 3
    assert ((batch["positions"][:, 1:] == 0) == (batch["loss_mask"][:, :-1] == 0)).all()
    assert (batch["tokens"][:, 1:] == batch["targets"][:, :-1]).all()


def test_default_settings_are_settings(script):
    for name in (*script.TARGETS, "tiny"):
        assert all(script.Setting(**setting) for setting in script.DEFAULT_SETTINGS[name])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--settings=[{", "error: --settings: not JSON"),
        ("--settings=[]", "error: --settings: must be a list of mappings"),
        ('--settings=[{}, {"batch": 8}]', "error: --settings[1].batch: no such key; did you mean 'batch_size'?"),
        ("--remat=ful", "error: --settings[0].remat: 'ful' is not one of"),
    ],
)
def test_mistakes(tmp_path, argument, message):
    done = run("bench_mfu.py", "--size=tiny", f"--output={tmp_path / 'mfu.json'}", argument)
    assert error_of(done).startswith(message)
    assert not any(tmp_path.iterdir())
