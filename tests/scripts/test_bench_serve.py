"""The comparison of serving engines: its jobs, its arithmetic, and a small run."""

import importlib
import json
import sys

import pytest
from script_processes import ROOT, error_of, run

from ml.errors import UserError


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield importlib.import_module("bench_serve")


def test_jobs_share_what_they_say(bench):
    jobs = sys.modules.get("serve_bench.workloads") or importlib.import_module("serve_bench.workloads")
    shared = jobs.shared(8)
    assert {tuple(p[:512]) for p in shared.prompts} == {tuple(shared.prompts[0][:512])}
    assert len({tuple(p[512:]) for p in shared.prompts}) == 8 and {len(p) for p in shared.prompts} == {544}
    alone = jobs.unshared(64)
    assert len({p[0] for p in alone.prompts}) > 60 and 32 <= min(map(len, alone.prompts)) < max(map(len, alone.prompts))
    tree = jobs.two_level(64)
    assert len({tuple(p[:256]) for p in tree.prompts}) == 2 and len({tuple(p[:384]) for p in tree.prompts}) == 8
    assert jobs.two_level(64) == tree
    longest = max(len(p) + job.new_tokens for job in (shared, alone, tree) for p in job.prompts)
    assert longest <= jobs.ARCHITECTURE["max_length"]


def test_agreement_counts_tokens_before_the_first_that_differs(bench):
    assert bench._agreement([1, 2, 3, 4], [1, 2, 9, 4]) == 0.5
    assert bench._agreement([1, 2], [1, 2, 3, 4]) == 0.5
    assert bench._agreement([5], [5]) == 1.0


def test_what_fails_is_reported_and_the_median_counts(bench):
    answers = [{"seconds": s, "tokens": [[1, 2]], "version": "x"} for s in (3.0, 1.0, 2.0)]
    summary = bench._summary({}, answers, [[1, 3]])
    assert (summary["seconds"], summary["tokens_per_second"], summary["agreement"]) == (2.0, 1.0, 0.5)
    assert bench._summary({"a": 1}, [{"error": "no"}], [[1]]) == {"options": {"a": 1}, "error": "no"}


def test_mistakes(bench, tmp_path):
    wrong = run("bench_serve.py", "--peer=transformers", "--peer_python=nowhere", f"--output={tmp_path}")
    assert error_of(wrong).startswith("error: --peer_python=nowhere: no such interpreter; `make env-parity` makes it")
    wrong = run("bench_serve.py", "--job=unshared", "--ways=prefix_once", f"--output={tmp_path}")
    assert error_of(wrong).startswith("error: --ways=prefix_once: for this job choose from padded, generate_batch")
    with pytest.raises(UserError, match="others take 50% of this machine's time"):
        bench.machine.refuse(0.5)
    bench.machine.refuse(0.0)
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_small_run(tmp_path):
    flags = ("--job=two_level", "--requests=16", "--rounds=1", "--allow_load", f"--output={tmp_path}")
    assert run("bench_serve.py", *flags).returncode == 0
    results = json.loads((tmp_path / "bench_serve_two_level.json").read_text())["results"]
    assert {name: result["agreement"] for name, result in results.items()} == dict.fromkeys(results, 1.0)
    assert all(result["cached_tokens"] > 0 for result in results.values())
