"""The measurement of latencies: its arithmetic, its mistakes, and a small run."""

import importlib
import json

import pytest
from script_processes import ROOT, error_of, run


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield importlib.import_module("bench_latency")


def test_percentiles_are_of_each_turn_and_the_median_turn_counts(bench):
    turns = [{"first_token": [top * i / 100 for i in range(101)]} for top in (3.0, 1.0, 2.0)]
    summary = bench._summary(turns)["first_token"]
    assert summary["p50"] == 1.0 and summary["p50_of_turns"] == [1.5, 0.5, 1.0]
    assert summary["p99"] == pytest.approx(1.98) and summary["max"] == 2.0


@pytest.mark.parametrize("loads", ["0.5,2", "much"])
def test_loads_below_what_the_engine_can_do(loads):
    assert error_of(run("bench_latency.py", f"--loads={loads}")).startswith(f"error: --loads={loads}: at 1 and above")


@pytest.mark.slow
def test_a_small_run(tmp_path):
    flags = ("--requests=4", "--rounds=1", "--loads=0.5", "--allow_load", f"--output={tmp_path}")
    assert run("bench_latency.py", *flags).returncode == 0
    (results,) = json.loads((tmp_path / "bench_latency.json").read_text())["results"].values()
    for way in ("chunked", "whole_prompts"):
        first, between = results[way]["first_token"], results[way]["between_tokens"]
        assert 0 < between["p50"] <= between["max"] and 0 < first["p50"] <= first["max"]
