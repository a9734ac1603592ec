"""Compilation is nearly all of these tests' time, and what is compiled runs for microseconds."""

import jax
import pytest


@pytest.fixture(scope="module")
def quick_compilation():
    """Programs are compiled without LLVM's costly passes."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
