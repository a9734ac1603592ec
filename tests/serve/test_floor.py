"""The scheduler's half runs where there is no JAX."""

import subprocess
import sys

import pytest

import ml.serve


def test_scheduling_imports_no_jax():
    code = "import sys, ml.serve, ml.serve.scheduling.scheduler as s; assert 'jax' not in sys.modules and s.Scheduler"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there():
    for name in ml.serve.__all__:
        assert getattr(ml.serve, name).__name__ == name
    with pytest.raises(AttributeError, match="Generator"):
        _ = ml.serve.Generator
