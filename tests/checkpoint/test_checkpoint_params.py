"""Parameters alone out of a training checkpoint."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ml.checkpoint import CheckpointConfig, Checkpointer, manifest, restore_params
from ml.errors import UserError


def make_params():
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float32)
    return {"mlp": {"up": {"kernel": kernel}}, "norm": {"scale": jnp.ones(8)}, "ids": jnp.arange(3)}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    params = make_params()
    moments = optax.adam(0.1).init({"mlp": params["mlp"]})
    state = {"params": params, "opt_state": moments, "ema": jax.tree.map(lambda x: x + x, params)}
    with Checkpointer(workdir, CheckpointConfig(every=10)) as checkpointer:
        checkpointer.save(10, state, None)
        checkpointer.save(20, state, None)
    return workdir


def assert_equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert jax.tree.map(lambda x: x.dtype, got) == jax.tree.map(lambda x: x.dtype, want)


def test_all_that_was_saved_without_knowing_anything(workdir):
    step, params = restore_params(workdir)
    assert step == 20
    assert_equal(params, make_params())
    assert restore_params(workdir / "checkpoints", 10)[0] == 10
    assert_equal(restore_params(workdir, subtree="ema")[1], jax.tree.map(lambda x: x + x, make_params()))


def test_onto_shardings_and_cast_only_when_asked(workdir):
    sharding = NamedSharding(jax.make_mesh((8,), ("data",)), P("data"))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make_params())
    abstract["mlp"]["up"]["kernel"] = jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=sharding)
    params = restore_params(workdir, abstract=abstract)[1]
    assert_equal(params, make_params())
    assert params["mlp"]["up"]["kernel"].sharding == sharding
    abstract["ids"] = jax.ShapeDtypeStruct((3,), jnp.float32)  # the cast is for what was saved as floats
    halved = restore_params(workdir, abstract=abstract, dtype=jnp.bfloat16)[1]
    want = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, make_params())
    assert_equal(halved, want)
    abstract["ids"] = make_params()["ids"]
    abstract["norm"]["scale"] = jax.ShapeDtypeStruct((8,), jnp.bfloat16)
    with pytest.raises(UserError, match="norm/scale"):
        restore_params(workdir, abstract=abstract)


def test_the_optimizer_state_is_not_read(workdir, monkeypatch):
    from ml.checkpoint import orbax_io

    asked = []
    load = orbax_io.load
    monkeypatch.setattr(orbax_io, "load", lambda path, wanted: asked.append(wanted) or load(path, wanted))
    restore_params(workdir)
    assert [set(wanted) for wanted in asked] == [{"params"}]


def test_what_is_missing_is_named(workdir):
    abstract = make_params()
    abstract["mlp"]["down"] = {"kernel": jnp.ones((8, 16)), "bias": jnp.ones(16)}
    with pytest.raises(UserError, match=r"lacks mlp/down/bias \(and 1 more\)"):
        restore_params(workdir, abstract=abstract)
    with pytest.raises(UserError, match="has no 'adapters'; it has: ema, opt_state, params"):
        restore_params(workdir, subtree="adapters")
    with pytest.raises(UserError, match="no checkpoint 15; there are: 10, 20"):
        restore_params(workdir, 15)
    with pytest.raises(UserError, match="has no checkpoint; train first"):
        restore_params(workdir / "elsewhere")


def test_a_damaged_one_is_passed_over_and_stays_where_it_is(workdir, tmp_path, caplog):
    import shutil

    shutil.copytree(workdir, tmp_path / "run")
    broken = tmp_path / "run/checkpoints/20"
    data = max((path for path in broken.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[100] ^= 1
    data.write_bytes(content)
    assert restore_params(tmp_path / "run")[0] == 10
    assert "checkpoints/20 is not whole" in caplog.text and broken.is_dir()
    assert manifest.read(broken).step == 20
