"""Data-sheet figures, and which chip a program is for."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.chips import ALIASES, CHIPS, chip_of, peak_flops
from pallas_kernels.platform import chip, platform


def test_peaks_of_known_chips():
    assert peak_flops("NVIDIA H200", jnp.bfloat16) == 989e12
    assert peak_flops("NVIDIA H200", "float16") == 989e12
    assert peak_flops("NVIDIA H200", jnp.float32) == 494.5e12
    assert peak_flops("TPU v5p", jnp.bfloat16) == 459e12
    assert peak_flops("cpu", jnp.float32) is None
    assert peak_flops("NVIDIA H200", jnp.int8) is None


@pytest.mark.parametrize("name", CHIPS)
def test_figures_are_plausible(name):
    figures = CHIPS[name]
    # Every machine here needs between 100 and 600 FLOP for each byte that it loads: a slip of a unit would show.
    assert 100 < figures.bf16_flops / figures.memory_bandwidth < 600
    assert 10e9 < figures.memory_bytes < 300e9
    assert figures.float32_flops <= figures.bf16_flops
    if name.startswith("TPU"):
        assert (figures.smem_bytes, figures.l2_bytes) == (0, 0) and figures.cores in (1, 2)
        assert 2**24 <= figures.vmem_bytes <= 2**27
    else:
        # One multiprocessor gives about the same everywhere: a slip in the number of them would show.
        assert 1e12 < figures.bf16_flops / figures.cores < 20e12
        assert 99 * 1024 <= figures.smem_bytes <= 227 * 1024 and 2**25 < figures.l2_bytes < 2**27 + 1
        assert figures.vmem_bytes == 0


def test_the_shared_memory_of_hopper():
    assert CHIPS["NVIDIA H200"].smem_bytes == 232_448


def test_two_names_of_one_chip_have_the_same_figures():
    assert all(CHIPS[alias] == CHIPS[name] for alias, name in ALIASES.items())


def test_unknown_chips():
    assert chip_of("cpu") is None and chip_of(None) is None and chip_of("TPU v5e") is CHIPS["TPU v5e"]


def test_figures_of_tpus_are_those_of_pallas():
    """JAX keeps the sizes that its own kernels go by."""
    from jax.experimental.pallas import tpu as pltpu

    for name in ("TPU v5 lite", "TPU v5", "TPU v6 lite"):
        device = jax.sharding.AbstractDevice(device_kind=name, num_cores=CHIPS[name].cores, platform="tpu")
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
            assert pltpu.get_tpu_info().vmem_capacity_bytes == CHIPS[name].vmem_bytes
            assert (platform(), chip()) == ("tpu", name)
    assert (platform(), chip()) == ("cpu", "cpu")


def test_a_program_knows_its_mesh_s_chip_while_it_is_traced():
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    seen = []

    @jax.jit
    def program(x):
        seen.append((platform(), chip()))
        return x

    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2,), ("data",), abstract_device=device)):
        program.trace(jax.ShapeDtypeStruct((4,), jnp.float32))
    assert seen == [("gpu", "NVIDIA H200")]
