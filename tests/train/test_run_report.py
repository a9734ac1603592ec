"""`report.html` and what it is made from: read back from a run's folder, drawn whole, self-contained, escaped."""

import html.parser
import math
import re

import numpy as np
import pytest
from run_folders import write_run

from ml.errors import UserError
from ml.train.reporting import MetricsFile, read_run, write_report
from ml.train.reporting.panels import panels_of, thinned
from ml.train.reporting.run import flattened


class _Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.links = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append(tag)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [value for name, value in found.items() if name in ("src", "href", "xlink:href")]


def test_the_page_holds_everything_and_needs_nothing(tmp_path):
    folder = write_run(tmp_path / "run", skip_me="no")
    write_report(read_run(folder), folder / "report.html")
    text = (folder / "report.html").read_text()
    page = _Page(text)
    titles = [panel.title for panel in panels_of(read_run(folder))]
    assert page.tags.count("svg") == len(titles) == 10
    assert {"Loss", "Throughput", "Trust ratios by layer", "Gradient noise scale", "Balance"} <= set(titles)
    for told in (*titles, "1.2500", "1.500", "4.20M", "step 40 of 40", "25.0%", "jax", "9.9", "train.steps"[6:]):
        assert told in text
    assert "&lt;script&gt;x" in text and "<b>chip" not in text and "script" not in page.tags
    assert all(link.startswith(("#", "data:")) for link in page.links), "nothing is fetched"
    assert not re.search(r"url\((?!#)|@import", text)
    assert len(set(page.ids)) == len(page.ids), "pictures side by side share no id"
    assert "var(--ink)" in text and "#222222" not in text and "prefers-color-scheme: dark" in text


def test_a_bare_run_has_a_page_too(tmp_path):
    with MetricsFile(tmp_path / "metrics.jsonl") as file:
        file.write(3, {"loss": math.nan, "trust_ratio/w": [math.nan, 0.0]})
    run = read_run(tmp_path)
    write_report(run, tmp_path / "report.html")
    assert "under way" in (tmp_path / "report.html").read_text()
    assert (run.settings, run.summary) == ({}, {}) and np.isnan(run.seconds).all()


def test_time_is_that_of_the_recorded_speed(tmp_path):
    with MetricsFile(tmp_path / "metrics.jsonl") as file:
        for step, speed in enumerate((None, 500.0, 1000.0, None, 250.0), 1):
            file.write(step, {"tokens": 1000, "tokens_seen": 1000 * step, "tokens_per_second": speed})
    np.testing.assert_allclose(read_run(tmp_path).seconds, np.cumsum([2, 2, 1, 4, 4]))  # unknown: as the next
    run = read_run(write_run(tmp_path / "run"))
    np.testing.assert_array_equal(run.tokens, 1000 * np.arange(1, 41))
    steps, ratios = run.trust_ratios()["mlp/up"]
    assert ratios.shape == (40, 2) and steps[-1] == 40 and run.trust_ratios()["embed"][1].shape == (40, 1)


def test_a_long_run_is_thinned_but_keeps_evaluations_and_the_end():
    rows = [{"step": step, **({"eval_loss": 1.0} if step % 999 == 0 else {})} for step in range(1, 50_001)]
    kept = thinned(rows, 100)
    assert len(kept) < 160 and kept[-1] is rows[-1] and sum("eval_loss" in row for row in kept) == 50
    assert thinned(rows[:50], 100) == rows[:50]


def test_settings_are_flattened_with_lists_of_groups():
    assert dict(flattened({"a": {"b": [{"c": 1}, {"c": 2}], "d": [1, 2]}, "e": {}})) == {
        "a.b[0].c": 1,
        "a.b[1].c": 2,
        "a.d": [1, 2],
        "e": {},
    }


def test_wrong_paths_are_named_with_what_is_there(tmp_path):
    folder = write_run(tmp_path / "runs" / "first")
    with pytest.raises(UserError, match=r"runs/frist: there is no such folder; runs in .*runs: first"):
        read_run(tmp_path / "runs" / "frist")
    with pytest.raises(UserError, match=r"lacks metrics.jsonl; did you mean one of its folders: first\?"):
        read_run(tmp_path / "runs")
    (folder / "experiment.json").write_text("{")
    with pytest.raises(UserError, match=r"experiment.json: cannot be read"):
        read_run(folder)
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="has no rows yet"):
        read_run(folder)


def test_images_are_counted_as_tokens_are(tmp_path):
    with MetricsFile(tmp_path / "metrics.jsonl") as file:
        for step in (1, 2):
            counts = {"images": 64, "images_seen": 64 * step, "images_per_second": 32.0, "broken_seen": 0}
            file.write(step, {"loss": 2.0 / step, **counts})
    run = read_run(tmp_path)
    assert run.unit == "images" and run.tokens.tolist() == [64, 128] and run.seconds.tolist() == [2, 4]
    assert [panel.title for panel in panels_of(run)][:2] == ["Loss", "Throughput"]
    write_report(run, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "images per second" in text and "images/s" in text and "tokens" not in text
