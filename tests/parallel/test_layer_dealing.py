"""Layers dealt round the stages of an interleaved pipeline arrive where they are computed, and come back."""

import itertools

import jax
import numpy as np
import pytest

from ml.parallel import MeshConfig, Rules
from ml.parallel.layer_dealing import _rounds, collect, deal

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize(("stages", "chunks"), list(itertools.product((1, 2, 3, 4, 6, 8, 12), (1, 2, 3, 4, 6, 8))))
def test_in_each_round_a_stage_sends_one_run_and_receives_one(stages, chunks):
    everyone = list(range(stages))
    rounds = _rounds(stages, chunks)
    assert len(rounds) == chunks
    for moves in rounds:
        assert sorted(owner for owner, *_ in moves) == everyone
        assert sorted(receiver for _, _, receiver, _ in moves) == everyone
    for owner, place, receiver, kept in itertools.chain.from_iterable(rounds):
        assert owner * chunks + place == kept * stages + receiver, "the same run at both ends"


@pytest.mark.parametrize(("stages", "chunks"), [(2, 2), (2, 3), (4, 2), (4, 4), (4, 1)])
def test_each_stage_gets_its_runs_and_the_owners_get_them_back(stages, chunks):
    rules = Rules.make(MeshConfig(data=1, fsdp=2, stage=stages), jax.devices()[: 2 * stages])
    layers = np.arange(stages * chunks * 2 * 4.0).reshape(-1, 4)  # two layers to a run
    with jax.set_mesh(rules.mesh):
        placed = jax.device_put(
            {"a": layers, "b": layers[:, 0]}, {"a": rules.sharding("layers", "embed"), "b": rules.sharding("layers")}
        )
        dealt = jax.jit(lambda x: deal(x, stages, chunks))(placed)
        back = jax.jit(lambda x: collect(x, stages, chunks))(dealt)
    # [chunk, stage, layer] seen from the stages: [stage, chunk, layer].
    expected = layers.reshape(chunks, stages, 2, 4).swapaxes(0, 1).reshape(-1, 4)
    np.testing.assert_array_equal(dealt["a"], expected)
    np.testing.assert_array_equal(dealt["b"], expected[:, 0])
    for name in placed:
        np.testing.assert_array_equal(back[name], placed[name])
        assert dealt[name].sharding == back[name].sharding == placed[name].sharding
