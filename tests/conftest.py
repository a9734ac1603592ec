"""What every test process needs before JAX is imported: the CPU as eight devices, and a compilation cache."""

import gc
import os
import pathlib
import random
import sys
import time

import pytest

if "jax" in sys.modules:
    raise RuntimeError("jax was imported before tests/conftest.py; the tests would run on one device")

_ROOT = pathlib.Path(__file__).resolve().parent.parent

# setdefault: JAX_PLATFORMS=cuda on the command line still chooses another device.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

# A collective of eight devices holds eight threads, of a pool that XLA makes as large as the machine.
os.environ.setdefault("NPROC", "32")

# Compilation is most of a test's time. The thresholds keep out only what is quicker to compile than to look up.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

# Subprocesses that tests start find the package also where it is not installed.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")]))

# No test may depend on the network, on a display, or on threads that fight with the other test processes.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser):
    parser.addoption(
        "--functions-per-file",
        type=int,
        metavar="N",
        help="of each file run N test functions, with one of their parameter sets each: a quick look at the whole",
    )


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem(collector, name):
    """A function marked ``sweep("a", "b")`` is slow with all its parameter sets but those named."""
    made = yield
    items = [item for item in made if isinstance(item, pytest.Function)] if isinstance(made, list) else []
    sweeps = [mark for item in items[:1] for mark in item.iter_markers("sweep")]
    if sweeps:
        unknown = set(sweeps[0].args) - {item.callspec.id for item in items}
        if unknown:
            raise collector.CollectError(f"{name} has no parameter set {sorted(unknown)}")
        for item in items:
            if item.callspec.id not in sweeps[0].args:
                item.add_marker(pytest.mark.slow)
    return made


@pytest.hookimpl(trylast=True)  # after -m and -k have chosen
def pytest_collection_modifyitems(config, items):
    count = config.getoption("--functions-per-file")
    if count is None:
        return
    files = {}
    for item in items:
        files.setdefault(item.path, {}).setdefault(item.originalname, []).append(item)
    chosen = set()
    for path, functions in files.items():
        rng = random.Random(path.name)  # the same ones every time, and others in another file
        names = rng.sample(sorted(functions), min(count, len(functions)))
        chosen |= {rng.choice(functions[name]) for name in names}
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]


@pytest.fixture(autouse=True)
def _room_for_programs():
    """Programs of CPUs take hundreds of memory maps each, and where Linux gives no more of them, XLA aborts."""
    began = time.monotonic()
    yield
    if time.monotonic() - began > 1:
        from ml.memory_maps import used_share

        if used_share() > 0.5:
            import jax

            jax.clear_caches()
            gc.collect()


@pytest.fixture(scope="module")
def quick_compilation():
    """Programs are compiled without LLVM's costly passes: many of them run for microseconds."""
    yield from _optimizations_disabled(True)


@pytest.fixture(scope="module")
def whole_compilation():
    """Programs are compiled as users' are, also where the command line says otherwise (`make test`)."""
    yield from _optimizations_disabled(False)


def _optimizations_disabled(value):
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", value)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def _uncached():
    """A program for a device that is not here can be written to the cache, but not read again."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def absent_tpus(whole_compilation):
    """Compiling for TPUs that are not here."""
    pytest.importorskip("libtpu", reason="libtpu has no wheel for this machine")
    yield from _uncached()


@pytest.fixture(scope="module")
def absent_gpus(whole_compilation):
    """Compiling for NVIDIA GPUs that are not here (tests marked ``cuda``)."""
    yield from _uncached()
