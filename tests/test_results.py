"""Numbers in the README and the table of papers are those that a script measured and that lie in docs/results."""

import json
import pathlib
import re

from ml.studies.record import read_records
from ml.studies.registry import studies
from ml.studies.table import table

ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_the_comparison_with_the_peer_is_the_committed_one():
    results = json.loads((ROOT / "docs/results/bench_train.json").read_text())["results"]
    rows = dict(re.findall(r"^\| (\d+M) \| (.*) \|$", (ROOT / "README.md").read_text(), flags=re.MULTILINE))
    assert {name.lower() for name in rows} == set(results)
    for name, cells in rows.items():
        measured = results[name.lower()]
        assert cells == f"{measured['speed_ratio']:.2f} | {measured['memory_ratio']:.2f}"


def test_the_serving_job_is_the_committed_one():
    results = json.loads((ROOT / "docs/results/cpu/bench_serve_shared.json").read_text())["results"]
    assert {result["agreement"] for result in results.values()} == {1.0}
    ratios = [f"{result['seconds'] / results['megabatch']['seconds']:.2f}" for result in results.values()]
    lines = {
        "transformers/padded": "`generate`, padded batches",
        "transformers/prefix_once": "`generate`, the prefix computed once",
        "megabatch/no_shared_attention": "this engine without shared-prefix attention",
    }
    readme = (ROOT / "README.md").read_text()
    for name, ratio in zip(results, ratios, strict=True):
        assert name == "megabatch" or f"\n| {lines[name]} | {ratio} |\n" in readme


def test_the_table_of_papers_is_what_the_studies_found():
    records = read_records(ROOT / "docs/results/studies")
    assert {record.study for record in records} <= set(studies())
    page = (ROOT / "docs/papers.md").read_text()
    assert page == table(records, "results/studies"), "run: python scripts/reproduce.py --table"
    for record in records:
        assert (ROOT / f"docs/results/studies/{record.stem}.png").exists() == bool(record.outcome.panels)
