"""Memory by category, against what the arrays' shapes and shardings say."""

import jax
import jax.numpy as jnp

from ml.parallel import MeshConfig, Rules
from ml.train.memory import MemoryUse, bytes_per_device, memory_use
from ml.train.state import TrainState


def test_bytes_of_the_shards_on_one_device():
    rules = Rules.make(MeshConfig(2, 2, 2))
    cut_both_ways = jax.device_put(jnp.zeros((8, 4), jnp.float32), rules.sharding("vocab", "embed"))
    cut_once = jax.device_put(jnp.zeros((8, 4), jnp.bfloat16), rules.sharding("layers", "embed"))
    everywhere = jax.device_put(jnp.zeros(3, jnp.int32), rules.sharding("norm"))
    assert bytes_per_device(cut_both_ways) == 8 * 4 * 4 // 4
    assert bytes_per_device(cut_once) == 8 * 4 * 2 // 2
    assert bytes_per_device({"a": [cut_both_ways, cut_once], "b": everywhere, "c": None}) == 32 + 32 + 12


def test_the_plan_of_a_compiled_step():
    zero = jnp.zeros((), jnp.int32)
    params = {"w": jnp.ones((256, 256))}
    state = TrainState(zero, params, (params, params), params, zero)

    def step(state):
        wide = jnp.sort(jnp.tile(state.params["w"], (1, 16)), axis=1)  # 4 MiB that live only within
        return jax.tree.map(lambda x: x + (wide @ wide.T).max().astype(x.dtype), state)

    use = memory_use(state, jax.jit(step).lower(state).compile())
    assert (use.params, use.opt_state, use.ema) == (2**18, 2**19, 2**18)
    assert 2**22 <= use.temporary < 2**24
    assert use.predicted == 2**20 + use.temporary


def test_as_text():
    use = MemoryUse(params=3 * 2**20, opt_state=6 * 2**20, ema=0, temporary=2**20, measured_peak=None)
    assert str(use) == "10 MiB a device = params 3 + opt state 6 + temporary 1"
    measured = MemoryUse(params=2**20, opt_state=0, ema=0, temporary=0, measured_peak=2**21)
    assert str(measured) == "1 MiB a device = params 1; measured peak 2"
