"""The first state of a run: the same on every mesh, cut as the table says, with buffers of its own."""

import functools

import jax
import numpy as np
import pytest
from training_cases import MODELS

from ml.models import Transformer, logical_axes
from ml.optim import OptimizerConfig, ScheduleConfig, make_optimizer
from ml.parallel import MeshConfig, Rules
from ml.train.state import init_state

pytestmark = pytest.mark.usefixtures("quick_compilation")


@functools.cache
def fresh(degrees, seed=0):
    model, count = MODELS["dense"], int(np.prod(degrees))
    rules = Rules.make(MeshConfig(*degrees), jax.devices()[:count])
    lamb = OptimizerConfig("lamb", 0.1)
    tx, _ = make_optimizer(lamb, ScheduleConfig(), total_steps=4, batch_size=8, axes=logical_axes(model))
    with jax.set_mesh(rules.mesh):
        return init_state(Transformer(model, place=rules.spec), tx, rules, seed=seed, ema=count > 1), rules


def values(state):
    return [np.asarray(x) for x in jax.tree.leaves(state.params)]


def test_a_seed_gives_the_same_parameters_on_every_mesh():
    one, several = fresh((1, 1, 1))[0], fresh((2, 2, 2))[0]
    for a, b in zip(values(one), values(several), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)
    assert any(np.any(a != b) for a, b in zip(values(one), values(fresh((1, 1, 1), seed=1)[0]), strict=True))


def test_everything_is_float32_zeroed_or_counted_from_zero():
    state, _ = fresh((2, 2, 2))
    assert {x.dtype for x in values(state)} == {np.dtype(np.float32)}
    assert int(state.step) == int(state.skipped) == 0
    assert not any(np.any(x) for x in jax.tree.leaves(jax.device_get(state.opt_state)))


def test_parameters_average_and_moments_lie_alike():
    state, rules = fresh((2, 2, 2))
    wanted = jax.tree.leaves(rules.shardings(logical_axes(MODELS["dense"]), state.params))
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    for leaves in (jax.tree.leaves(state.params), jax.tree.leaves(state.ema), moments[: len(wanted)]):
        for x, place in zip(leaves, wanted, strict=True):
            assert x.sharding.is_equivalent_to(place, x.ndim)
    assert len(moments) == 2 * len(wanted)


def test_the_average_starts_at_the_parameters_in_buffers_of_its_own():
    state, _ = fresh((2, 2, 2))
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(state.ema), strict=True):
        np.testing.assert_array_equal(a, b)
        pointers = [{s.data.unsafe_buffer_pointer() for s in x.addressable_shards} for x in (a, b)]
        assert not pointers[0] & pointers[1], "donating one would destroy the other"
    assert fresh((1, 1, 1))[0].ema is None
