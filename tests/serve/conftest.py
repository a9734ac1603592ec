"""What tests of engines ask for by name."""

import jax
import pytest


@pytest.fixture(scope="module")
def quick_compilation():
    """Programs are compiled without LLVM's costly passes."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
