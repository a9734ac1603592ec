"""Compiles the TPU kernel for chips that are not here: it fits, copies no cache, and is quicker than device memory."""

import functools
import re

import jax
import pytest

from pallas_kernels.absent import compile_for, reports
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.paged_attention.cases import SHAPES, arguments

pytestmark = pytest.mark.usefixtures("absent_tpus")


def _no_copy_of_the_cache(compiled, operands):
    """Neither of a cache nor of one of its layers, keys or scales."""
    cache = operands[1]
    extents = {_extents(shape) for x in jax.tree.leaves(cache) for shape in (x.shape, x.shape[1:])}
    text = compiled.as_text()
    for shape, op in re.findall(r"= \w+\[([\d,]+)\]\S* (copy|copy-start|transpose|fusion|slice|dynamic-slice)\(", text):
        assert _extents(int(extent) for extent in shape.split(",")) not in extents, (shape, op)
    assert (
        compiled.memory_analysis().temp_size_in_bytes < cache.key.size * cache.key.dtype.itemsize // cache.key.shape[0]
    )


def _extents(shape):
    """Whatever their order."""
    return tuple(sorted(extent for extent in shape if extent > 1))


def _compile(family, model, dtype, page_size, rows=None, batch=64, **options):
    operands = arguments(model, dtype, page_size, rows=rows, batch=batch)
    function = functools.partial(paged_attention, implementation="tpu", **options)
    compiled = compile_for(family, function, *operands)
    _no_copy_of_the_cache(compiled, operands)


@pytest.mark.sweep("v5e-llama3_8b-bfloat16-16", "v6e-qwen3_0.6b-float8_e4m3fn-128")
@pytest.mark.parametrize(
    ("family", "model", "dtype", "page_size"),
    [
        ("v5e", "llama3_8b", "bfloat16", 16),
        ("v6e", "qwen3_30b", "bfloat16", 64),
        ("v5p", "llama3_70b", "int8", 128),
        ("v5e", "gemma3_4b", "bfloat16", 64),
        ("v6e", "qwen3_0.6b", "float8_e4m3fn", 128),
    ],
)
def test_decoding_compiles(family, model, dtype, page_size):
    _compile(family, model, dtype, page_size, batch=256)


def test_ragged_rows_compile():
    _compile("v5e", "llama3_8b", "bfloat16", 64, rows=2048, window=4096, softcap=30.0)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["v5e", "v6e", "v5p"])
@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "page_size"), [("bfloat16", 16), ("bfloat16", 128), ("int8", 128), ("float8_e4m3fn", 128)]
)
@pytest.mark.parametrize(("rows", "invariant"), [(None, False), (2048, False), (2048, True)])
def test_every_model_compiles(family, model, dtype, page_size, rows, invariant):
    _compile(family, model, dtype, page_size, rows=rows, invariant=invariant)


# Cycles of a core in the time that device memory takes for a mebibyte: clock over the core's share of the bandwidth.
CYCLES = {"v5e": 1.5e9 * 2**20 / 819e9, "v6e": 1.75e9 * 2**20 / 1640e9, "v5p": 2 * 1.75e9 * 2**20 / 2765e9}


@pytest.mark.slow
@pytest.mark.parametrize("family", [pytest.param("v5e"), pytest.param("v6e", marks=pytest.mark.slow)])
def test_a_block_takes_less_time_than_it_takes_to_arrive(family):
    """By the compiler's schedule: the longest stretch between matrix products is the work on a block, masked or not."""
    (report,) = reports(family, ["paged_attention/decode/llama3_8b"]).values()
    (kernel,) = report["kernels"]
    assert kernel["hot_bundles"] < 0.75 * CYCLES[family]
    assert kernel["spill_stores"] < 0.1 * kernel["bundles"]
