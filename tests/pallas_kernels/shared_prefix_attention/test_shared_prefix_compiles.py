"""Attention over shared prefixes, compiled for machines that are not here: it fits, spills nothing, copies no cache."""

import math

import pytest

from pallas_kernels.absent import TARGETS, reports
from pallas_kernels.chips import CHIPS
from pallas_kernels.paged_attention.gpu_config import SMEM_BYTES
from pallas_kernels.shared_prefix_attention.cases import cases

CASES = {case.name: case for case in cases()}
# The others are compiled by tests marked slow.
SOME = "shared_prefix_attention/tree/llama3_8b/bfloat16"
NAMES = [name if name == SOME else pytest.param(name, marks=pytest.mark.slow) for name in CASES]


def compiled(family, name):
    """The kernels of a case, of which no copy of a layer of the cache was made."""
    (report,) = reports(family, [name]).values()
    assert "error" not in report, report["error"]
    layers, *of_layer = CASES[name].arguments[1].key.shape
    assert layers > 1
    assert report["memory"]["temp"] < math.prod(of_layer) * CASES[name].arguments[1].key.dtype.itemsize
    return report["kernels"]


@pytest.mark.parametrize("family", ["v5e", *(pytest.param(x, marks=pytest.mark.slow) for x in ("v5p", "v6e"))])
@pytest.mark.parametrize("name", NAMES)
def test_tpus(absent_tpus, family, name):
    kernels = compiled(family, name)
    # The nodes' rows as matrices and as single rows, and the rows' own tokens; one for each in the fixed order.
    assert len(kernels) == (2 if "/invariant/" in name else 3)
    for kernel in kernels:
        assert kernel["vmem_bytes"] < CHIPS[TARGETS[family].device_kind].vmem_bytes
    tiles = max(kernels, key=lambda kernel: kernel["shares"]["MXU"])
    assert "/invariant/" in name or tiles["shares"]["MXU"] > (0.6 if family == "v6e" else 0.9)


@pytest.mark.cuda
@pytest.mark.parametrize("name", NAMES)
def test_the_h200(absent_gpus, name):
    for kernel in compiled("h200", name):
        assert (kernel["spill_stores"], kernel["spill_loads"]) == (0, 0), kernel
        assert kernel["smem_bytes"] <= SMEM_BYTES
        assert kernel["tma_loads"] > 0
        assert kernel["wgmma"] >= 12 or kernel["name"].endswith("merge")
