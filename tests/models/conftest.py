"""What tests of models against other libraries ask for by name."""

import importlib

import pytest


@pytest.fixture
def transformers(request):
    """Missing is a failure where parity was asked for, and a skip in a run of everything."""
    if "parity" in request.config.option.markexpr:
        return importlib.import_module("transformers")
    return pytest.importorskip("transformers")
