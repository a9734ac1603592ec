"""`ml/studies/table.py`: the table says what the records say, whatever their order."""

import pathlib

from outcome_cases import outcome, record

from ml.studies.methods import METHODS
from ml.studies.outcome import Measured
from ml.studies.table import measured, table, write_table

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_rows_tell_claim_measurement_and_verdict():
    failed = outcome(holds=False, reason="the noise\nis larger", url="https://example.org", panels=())
    page = table([record("z"), record("a", outcome=failed, budget="gpu")], "results/studies")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert rows[0] == (
        "| `a_gpu` | [A paper (2020)](https://example.org) | a method (`ml/optim/lamb.py`) | Ours is lower \\| than "
        "theirs | ours 1.10 ± 0.10, theirs 2.20 ± 0.20 nats (3 seeds); [JSON](results/studies/a_gpu.json) | "
        "**no**: the noise is larger |"
    )
    assert rows[1].startswith("| `z` | A paper (2020) |") and rows[1].endswith("[plot](results/studies/z.png) | yes |")
    assert "**`z`**, on a CPU: three numbers" in page
    assert page == table([record("a", outcome=failed, budget="gpu"), record("z")], "results/studies")


def test_numbers_have_the_digits_that_their_spread_allows():
    sides = {
        (1.0, 1.1, 1.2): "1.10 ± 0.10",
        (100.0, 150.0, 260.0): "170 ± 82",
        (1200.0, 1500.0, 2700.0): "1,800 ± 794",
        (1e-6, 2e-6, 3e-6): "2e-06 ± 1e-06",
        (0.5, 0.5, 0.5): "0.5",
    }
    for values, text in sides.items():
        shown = measured(outcome(baseline=Measured("theirs", (1e9,)), ours=Measured("ours", values)))
        assert shown == f"ours {text}, theirs 1,000,000,000 nats (3 seeds)"
    assert measured(outcome(seeds=(), baseline=Measured("a", (2.0,)), ours=Measured("b", (1.0,)))) == "b 1, a 2 nats"


def test_links_lead_from_the_page_to_the_files(tmp_path):
    write_table(tmp_path / "docs/results/studies", tmp_path / "docs/papers.md")
    assert "No study has been run yet" in (tmp_path / "docs/papers.md").read_text()


def test_methods_that_are_listed_are_there():
    assert [method.where for method in METHODS if not (ROOT / method.where).exists()] == []
    assert len({method.paper for method in METHODS}) == len(METHODS)
