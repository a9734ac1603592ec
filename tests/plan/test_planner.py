"""The search: its plans respect the model, the batch and the memory, and the obvious is chosen."""

import dataclasses
import itertools
import math

import pytest
from planned_cases import experiment

from ml.errors import UserError
from ml.models import MoEConfig
from ml.parallel import AXES
from ml.plan import topology as topologies
from ml.plan.mends import changed
from ml.plan.planner import MARGIN, search
from ml.plan.program import assemble
from ml.plan.topology import parse


@pytest.fixture(scope="module")
def plans():
    return search(experiment({"num_layers": 4}, batch_size=32), parse("v5e:4x4"))


def test_every_plan_is_a_valid_experiment_that_fits(plans):
    config = experiment({"num_layers": 4}, batch_size=32)
    assert len(plans) > 50
    for plan in plans:
        chosen = changed(config, plan.overrides)
        degrees = chosen.mesh.degrees
        assert math.prod(degrees.values()) == 16
        assert config.model.num_kv_heads % degrees["tensor"] == 0 and config.model.num_layers % degrees["stage"] == 0
        assert degrees["expert"] == 1, "no experts here"
        shards = degrees["data"] * degrees["fsdp"] * chosen.train.microbatches
        assert config.train.batch_size % shards == 0
        assert chosen.train.microbatches >= degrees["stage"]
        assert plan.memory.total <= MARGIN * parse("v5e:4x4").kind.usable_bytes
        assert 0 < plan.mfu < 1
    assert len({plan.flags for plan in plans}) == len(plans)


def test_fastest_first_and_simple_where_equal(plans):
    times = [plan.latency.total for plan in plans]
    assert all(later > 0.99 * earlier for earlier, later in itertools.pairwise(times))
    assert "--config.mesh.layout=" in plans[0].flags and "--config.train.microbatches=" in plans[0].flags


def test_a_plan_can_be_built_on_real_devices():
    config = experiment(batch_size=32)
    for plan in search(config, parse("v5e:2x4"))[:3]:
        if plan.overrides.get("mesh.stage", 1) == 1:
            program = assemble(changed(config, plan.overrides))
            assert program.rules.mesh.size == 8


def test_experts_are_spread_only_as_far_as_there_are_any():
    config = experiment(batch_size=32)
    moe = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=MoEConfig(4, 2, 256)))
    degrees = {plan.overrides.get("mesh.expert", 1) for plan in search(moe, parse("v5e:2x4"))}
    assert degrees == {1, 2, 4}


def test_slices_are_spanned_by_replicas():
    for plan in search(experiment(batch_size=32), parse("2*v5e:2x2")):
        assert plan.overrides["mesh.slices"] == 2 and plan.overrides["mesh.data"] % 2 == 0


def test_little_memory_forces_sharding(monkeypatch):
    config = experiment({"vocab_size": 8192}, batch_size=32)
    free = search(config, parse("v5e:4x4"))
    layouts = {plan.overrides["mesh.layout"] for plan in free}
    assert {"ddp", "hybrid", "zero1", "zero2"} == layouts
    least = min(plan.memory.total for plan in free)
    tight = dataclasses.replace(topologies.FAMILIES["v5e"], usable_bytes=1.05 * least / MARGIN)
    monkeypatch.setitem(topologies.FAMILIES, "v5e", tight)
    for plan in search(config, parse("v5e:4x4")):
        assert plan.overrides["mesh.layout"] != "ddp"
        assert max(plan.overrides.get(f"mesh.{axis}", 1) for axis in AXES) > 1


def test_what_cannot_be_says_by_how_much(monkeypatch):
    small = dataclasses.replace(topologies.FAMILIES["v5e"], usable_bytes=2.0**20)
    monkeypatch.setitem(topologies.FAMILIES, "v5e", small)
    with pytest.raises(UserError, match=r"no arrangement fits; the smallest needs \d+\.\d of 0\.0 GiB"):
        search(experiment(batch_size=32), parse("v5e:4x4"))


def test_a_batch_that_no_mesh_divides_is_named():
    with pytest.raises(UserError, match="batch of 7"):
        search(experiment(batch_size=7), parse("2*v5e:4x4"))
