"""Preflight of a tiny model for eight TPU chips that are not here, compiled once for all tests of this file."""

import dataclasses
import io
import json
import math

import jax
import pytest
from planned_cases import experiment
from rich.console import Console

from ml.models.cost import train_flops_per_token
from ml.plan import topology as topologies
from ml.plan.collectives import by_axes
from ml.plan.memory import MemoryModel
from ml.plan.mends import changed, rules_of
from ml.plan.preflight import preflight
from ml.plan.program import Program, assemble
from ml.plan.topology import parse

CONFIG = experiment(mesh={"data": 1, "fsdp": 4, "tensor": 2}, microbatches=2)


@pytest.fixture(scope="module")
def compiled(absent_tpus):
    return assemble(CONFIG, parse("v5e:2x4").devices()).compile()


@pytest.fixture
def report(compiled, monkeypatch):
    monkeypatch.setattr(Program, "compile", lambda self: compiled)
    return preflight(CONFIG, parse("v5e:2x4"))


def test_memory_is_what_the_layout_says_and_the_compiler_plans(report, compiled):
    memory, plan = report.memory, compiled.memory_analysis()
    params, opt_state = MemoryModel(CONFIG).state_bytes(rules_of(CONFIG, 8))
    assert (memory.params, memory.opt_state) == (params, opt_state)
    assert memory.batch == 5 * 16 * 256 * 4 // 4, "five arrays of four bytes, cut four ways"
    arguments = memory.params + memory.opt_state + memory.ema + memory.batch
    assert arguments == pytest.approx(plan.argument_size_in_bytes, rel=0.05), "tiles pad small arrays"
    assert memory.temporary == plan.temp_size_in_bytes > 0
    assert memory.needed == pytest.approx(arguments + memory.temporary + memory.program, rel=0.05)
    assert memory.available == 15.75 * 2**30 and report.fits and report.mends == []


@pytest.mark.slow
def test_what_rests_on_the_host_is_not_on_the_device(report):
    offloaded = preflight(changed(CONFIG, {"train.offload_optimizer": True}), parse("v5e:2x4")).memory
    scalars = offloaded.opt_state  # they stay
    assert scalars < 100 and offloaded.host + scalars == report.memory.opt_state
    assert offloaded.needed == report.memory.needed - offloaded.host


def test_the_kernel_for_tpus_is_taken_though_none_is_here(compiled):
    assert "splash" in compiled.as_text() and jax.default_backend() == "cpu"


def test_collectives_are_those_of_the_layout(report):
    axes = {axes for _, axes in by_axes(report.collectives)}
    assert axes <= {("fsdp",), ("tensor",), ("fsdp", "tensor")} and {("fsdp",), ("tensor",)} <= axes
    # Each layer's weights are gathered along fsdp for forward and for backward, in each of two microbatches, 16 bits
    # each; the unembedding once each microbatch. XLA may take other kinds, for small ones all-reduces too.
    kernels = 2 * (256 * 128 * (4 + 4 + 4) + 3 * 256 * 512) // 2
    least = 2 * 2 * kernels * 2 * 3 / 4
    moved = sum(size for (_, along), (size, _) in by_axes(report.collectives).items() if along == ("fsdp",))
    assert least < moved < 6 * least


def test_flops_and_bounds(report):
    tokens = 16 * 256
    assert report.flops["model"] == train_flops_per_token(CONFIG.model, 256) * tokens / 8
    assert 1.1 < report.flops["computed"] / report.flops["model"] < 1.6, "the forward pass is computed again"
    line = report.roofline
    assert line.compute == pytest.approx(report.flops["computed"] / 197e12)
    assert 0 < line.serial_mfu < line.mfu < 1
    assert line.seconds == max(line.compute, line.memory, *line.network.values())
    assert line.binding != "compute", "such a model is far too small"


def test_json_holds_everything(report):
    plain = json.loads(json.dumps(report.to_json()))
    assert set(plain) == {
        *("topology", "device_kind", "devices", "mesh", "layout", "tokens", "memory", "collectives", "flops"),
        *("roofline", "mends", "compile_seconds", "versions", "note", "fits"),
    }
    assert plain["devices"] == 8 and plain["mesh"]["tensor"] == 2 and plain["fits"] is True
    assert "nothing was run or timed" in plain["note"]
    assert {"kind", "axes", "bytes", "times"} == set(plain["collectives"][0])
    assert plain["roofline"]["binding"] == report.roofline.binding
    assert {"jax", "libtpu"} <= set(plain["versions"])
    assert 0 < plain["roofline"]["mfu"] < 1


def printed(report) -> str:
    out = io.StringIO()
    report.print(Console(file=out, width=120))
    return out.getvalue()


def test_the_tables_say_what_is_predicted(report):
    text = printed(report)
    for part in (
        "8 x TPU v5e",
        "fsdp=4 x tensor=2",
        "nothing was run or timed",
        "optimizer state",
        "available",
        "fits:",
    ):
        assert part in text
    assert report.roofline.binding in text


@pytest.mark.slow
def test_a_program_too_large_comes_with_its_mends(compiled, monkeypatch):
    monkeypatch.setattr(Program, "compile", lambda self: compiled)
    whole = preflight(CONFIG, parse("v5e:2x4")).memory.needed
    tight = dataclasses.replace(topologies.FAMILIES["v5e"], usable_bytes=0.9 * whole)
    monkeypatch.setitem(topologies.FAMILIES, "v5e", tight)
    report = preflight(CONFIG, parse("v5e:2x4"))
    assert not report.fits and report.mends
    assert report.verdict().startswith("does not fit: needs 0.") and "--config." in report.verdict()
    assert report.to_json()["mends"][0]["bytes"] <= 0.9 * whole
    assert "does not fit" in printed(report)


def test_a_compiler_that_refuses_is_read(monkeypatch):
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 19.20G of 15.75G hbm."

    def refuse(self):
        raise jax.errors.JaxRuntimeError(message)

    pytest.importorskip("libtpu", reason="libtpu has no wheel for this machine")
    monkeypatch.setattr(Program, "compile", refuse)
    report = preflight(CONFIG, parse("v5e:2x4"))
    assert not report.fits and report.memory.needed == pytest.approx(19.2 * 2**30)
    assert report.roofline is None and report.collectives == [] and report.memory.temporary is None
    assert "needs 19.2 of 15.8 GiB" in report.verdict()
    assert "refused" in printed(report)
    json.dumps(report.to_json())


def test_another_error_of_the_compiler_is_not_hidden(monkeypatch):
    def fail(self):
        raise jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed")

    pytest.importorskip("libtpu", reason="libtpu has no wheel for this machine")
    monkeypatch.setattr(Program, "compile", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Mosaic"):
        preflight(CONFIG, parse("v5e:2x4"))


def test_committed_reports_are_of_experiments_here_and_say_what_they_hold(pytestconfig):
    folder = pytestconfig.rootpath / "docs" / "results"
    paths = sorted(folder.glob("preflight_*.json"))
    assert len(paths) >= 4
    for path in paths:
        report = json.loads(path.read_text())
        (config,) = [word.split("=")[1] for word in report["command"].split() if word.startswith("--config=")]
        assert (pytestconfig.rootpath / config.split(":")[0]).is_file()
        assert f"--topology={report['topology']}" in report["command"]
        assert f"--json=docs/results/{path.name}" in report["command"]
        memory, machine = report["memory"], parse(report["topology"])
        assert report["devices"] == machine.device_count == math.prod(report["mesh"].values())
        assert report["fits"] == (memory["needed"] <= memory["available"])
        parts = ("params", "opt_state", "ema", "batch", "temporary", "program")
        assert memory["needed"] == pytest.approx(sum(memory[part] for part in parts), rel=0.01)
        assert 0 < report["roofline"]["serial_mfu"] <= report["roofline"]["mfu"] < 1
