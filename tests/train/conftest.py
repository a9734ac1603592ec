"""Runs of milliseconds, of which nobody looks at the report."""

import pytest


@pytest.fixture(autouse=True)
def undrawn_reports(request, monkeypatch):
    """Drawing ``report.html`` takes longer than such runs; tests that look at it ask for `drawn_reports`."""
    if "drawn_reports" not in request.fixturenames:
        monkeypatch.setattr("ml.train.closing.write_report", lambda run, path: path.write_text(""))


@pytest.fixture
def drawn_reports():
    """Reports are drawn, as users have them."""
