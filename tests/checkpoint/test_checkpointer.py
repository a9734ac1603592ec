"""Saving and restoring whole states: exactness, layouts, retention, and refusing what does not fit."""

import json
import os
import subprocess
import sys
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ml.checkpoint import CheckpointConfig, Checkpointer
from ml.errors import UserError

EVERY_STEP = CheckpointConfig(every=1, keep=2)


@flax.struct.dataclass
class State:
    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array
    ema: Any = None


def make_state(seed=0, mesh=None, spec=P("data", "tensor")):
    """A state with every kind of container and leaf, its matrices sharded over ``mesh``."""
    random = np.random.default_rng(seed)
    matrix = jnp.asarray(random.normal(size=(16, 8)), jnp.float32)
    if mesh is not None:
        matrix = jax.device_put(matrix, NamedSharding(mesh, spec))
    params = {
        "layers": {"mlp": {"up": {"kernel": matrix, "bias": jnp.asarray(random.normal(size=8), jnp.bfloat16)}}},
        "quantized": jnp.arange(-4, 4, dtype=jnp.int4),
        "none_of_it": jnp.zeros((0, 3)),
    }
    floats = {"layers": params["layers"]}
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(0.1, 0.0, 10)))
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), 8)
    return State(jnp.int32(seed), params, tx.init(floats), keys)


def abstract(state, mesh=None, spec=P("data", "tensor")):
    def describe(leaf):
        sharding = NamedSharding(mesh, spec if leaf.ndim == 2 and leaf.size else P()) if mesh else leaf.sharding
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(describe, state)


def assert_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, path
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            assert jax.random.key_impl(a) == jax.random.key_impl(b)
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


def test_what_is_restored_is_bit_for_bit_what_was_saved(tmp_path):
    state = make_state(3)
    with Checkpointer(tmp_path, EVERY_STEP) as checkpointer:
        assert checkpointer.latest_step() is None
        assert checkpointer.save(3, state, {"epoch": 1, "worker": [7, 8]})
    with Checkpointer(tmp_path, EVERY_STEP) as checkpointer:
        assert checkpointer.latest_step() == 3
        restored = checkpointer.restore(abstract(state))
    assert (restored.step, restored.data_state) == (3, {"epoch": 1, "worker": [7, 8]})
    assert_equal(restored.state, state)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"3", ".lock"}


@pytest.mark.parametrize(("shape", "spec"), [((2, 4), P("tensor", "data")), ((8, 1), P("data")), ((1, 8), P())])
def test_a_state_is_restored_onto_another_mesh(tmp_path, shape, spec):
    state = make_state(1, jax.make_mesh((4, 2), ("data", "tensor")))
    with Checkpointer(tmp_path, EVERY_STEP) as checkpointer:
        checkpointer.save(1, state, None)
        mesh = jax.make_mesh(shape, ("data", "tensor"))
        restored = checkpointer.restore(abstract(state, mesh, spec)).state
    assert_equal(restored, state)
    kernel = restored.params["layers"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)


def test_shardings_of_an_abstract_mesh_are_resolved_by_the_mesh_in_use(tmp_path):
    mesh = jax.make_mesh((8,), ("data",))

    def init():
        return {"w": jax.random.normal(jax.random.key(0), (16, 4), out_sharding=P("data"))}

    with jax.set_mesh(mesh), Checkpointer(tmp_path, EVERY_STEP) as checkpointer:
        state = jax.jit(init)()
        checkpointer.save(1, state, None)
        restored = checkpointer.restore(jax.eval_shape(init)).state
    assert_equal(restored, state)
    assert restored["w"].sharding.is_equivalent_to(NamedSharding(mesh, P("data")), 2)
    assert restored["w"].sharding.mesh == mesh


def test_buffers_may_be_donated_and_the_data_state_changed_right_after_save(tmp_path):
    step_on = jax.jit(lambda x: x * 1.5 + 1, donate_argnums=0)
    sharding = NamedSharding(jax.make_mesh((8,), ("data",)), P("data"))
    x = jax.device_put(jnp.arange(1 << 20, dtype=jnp.float32), sharding)
    data_state = {"seen": [0]}
    expected = {}
    with Checkpointer(tmp_path, CheckpointConfig(every=1, keep=5)) as checkpointer:
        for step in range(1, 6):
            expected[step] = np.array(x)
            data_state["seen"].append(step)
            checkpointer.save(step, {"x": x}, data_state)
            data_state["seen"][0] = step
            for _ in range(3):
                x = step_on(x)
        for step, want in expected.items():
            restored = checkpointer.restore({"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)}, step)
            np.testing.assert_array_equal(np.asarray(restored.state["x"]), want)
            assert restored.data_state == {"seen": [step - 1, *range(1, step + 1)]}
            checkpointer._saved.clear()


def test_only_due_steps_are_saved_and_only_the_newest_kept(tmp_path):
    state = {"w": jnp.ones(3)}
    with Checkpointer(tmp_path, CheckpointConfig(every=2, keep=2, keep_every=4)) as checkpointer:
        saved = [step for step in range(1, 12) if checkpointer.save(step, state, None)]
        assert saved == [2, 4, 6, 8, 10]
        assert checkpointer.save(11, state, None, force=True)
        assert not checkpointer.save(11, state, None, force=True)
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit())
    assert kept == [4, 8, 10, 11]


def test_going_on_from_an_older_step_sets_the_newer_ones_aside(tmp_path):
    def state(value):
        return {"w": jnp.full(3, value, jnp.float32)}

    with Checkpointer(tmp_path, CheckpointConfig(every=1, keep=5)) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, state(step), None)
        checkpointer.restore(state(0), step=1)
        checkpointer.save(2, state(20), None)
    with Checkpointer(tmp_path) as checkpointer:
        restored = checkpointer.restore(state(0))
    assert restored.step == 2 and float(restored.state["w"][0]) == 20
    assert (tmp_path / "checkpoints/3.superseded").is_dir()


def test_differences_from_the_wanted_state_are_named_and_nothing_is_cast(tmp_path):
    state = {"params": {"a": jnp.ones((2, 3)), "b": jnp.ones(4)}, "step": jnp.int32(1)}
    with Checkpointer(tmp_path, EVERY_STEP) as checkpointer:
        checkpointer.save(1, state, None)

        def refuses(changed, *words):
            with pytest.raises(UserError) as caught:
                checkpointer.restore(changed)
            for word in words:
                assert word in str(caught.value)
            assert "\n" not in str(caught.value)

        params = state["params"]
        refuses(
            {**state, "params": {**params, "b": jnp.ones(4, jnp.bfloat16)}}, "params/b", "bfloat16[4]", "float32[4]"
        )
        refuses({**state, "params": {**params, "a": jnp.ones((3, 2))}}, "params/a", "[2, 3]", "[3, 2]")
        refuses({**state, "params": {**params, "c": jnp.ones(1)}}, "lacks params/c")
        refuses({"params": params}, "also holds step")
        assert_equal(checkpointer.restore(state).state, state)


def test_asking_for_what_is_not_there_lists_what_is(tmp_path):
    state = {"w": jnp.ones(3)}
    with Checkpointer(tmp_path, EVERY_STEP) as checkpointer:
        with pytest.raises(UserError, match="has no checkpoint; train first"):
            checkpointer.restore(state)
        checkpointer.save(5, state, None)
        with pytest.raises(UserError, match=r"no checkpoint 7; there are: 5$"):
            checkpointer.restore(state, step=7)


def test_data_states_that_json_cannot_hold_and_leaves_that_are_no_arrays_are_refused(tmp_path):
    with Checkpointer(tmp_path, EVERY_STEP) as checkpointer:
        with pytest.raises(TypeError):
            checkpointer.save(1, {"w": jnp.ones(3)}, {"bad": object()})
        with pytest.raises(TypeError, match="lr is a float"):
            checkpointer.save(1, {"w": jnp.ones(3), "lr": 0.1}, None)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [".lock"]


def test_two_runs_cannot_write_to_one_folder(tmp_path):
    other = "import sys; from ml.checkpoint import Checkpointer; Checkpointer(sys.argv[1])"
    with Checkpointer(tmp_path, EVERY_STEP):
        done = subprocess.run([sys.executable, "-c", other, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "another process is training there" in done.stderr


def test_saving_and_restoring_say_nothing(tmp_path):
    program = """
import sys, jax.numpy as jnp
from absl import app, logging
from ml.checkpoint import Checkpointer, CheckpointConfig
def main(argv):
    with Checkpointer(argv[1], CheckpointConfig(every=1)) as checkpointer:
        checkpointer.save(1, {"w": jnp.ones(3)}, None)
        checkpointer.restore({"w": jnp.ones(3)})
    logging.info("the program's own words")
app.run(main)
"""
    command = [sys.executable, "-c", program, str(tmp_path), "--verbosity=0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    assert len(lines) == 1 and "the program's own words" in lines[0]


def test_the_manifest_lists_leaves_for_a_reader(tmp_path):
    with Checkpointer(tmp_path, EVERY_STEP) as checkpointer:
        checkpointer.save(1, make_state(), None)
    manifest = json.loads((tmp_path / "checkpoints/1/manifest.json").read_text())
    assert manifest["leaves"]["params/layers/mlp/up/bias"] == [[8], "bfloat16"]
    assert "opt_state/1/0/mu/layers/mlp/up/kernel" in manifest["leaves"]


@pytest.mark.parametrize("bad", [{"every": 0}, {"keep": 0}, {"keep_every": -1}])
def test_senseless_settings_are_refused(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be at least 1"):
        CheckpointConfig(**bad)
