"""The TPU kernels, compiled for TPUs that are not here, and what their static schedules promise."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.absent import TARGETS, compile_for, reports
from pallas_kernels.cases import Case
from pallas_kernels.chips import CHIPS
from pallas_kernels.flash_attention import tpu
from pallas_kernels.flash_attention.cases import MODELS, gradients, operands

# Shares of the matrix units' slots in the loop over tiles, forward: what is left of the vector units' work shows.
FORWARD = {"v5e": 0.78, "v5p": 0.78, "v6e": 0.70}
BACKWARD = 0.80
# Capping the logits costs a tangent and a product per score, more than the v6e's vector units can hide.
FORWARD_CAPPED = {"v5e": 0.78, "v5p": 0.78, "v6e": 0.60}

# Float32, half lanes, lengths that are no whole tiles, and long contexts: one kernel for the gradients or two.
FLOAT32 = Case("", gradients("tpu"), operands(2, 1, 96, 1000, jnp.float32))
HALF_LANES = Case("", gradients("tpu", window=512), operands(4, 1, 64, 4000))
LONG = Case("", gradients("tpu"), operands(4, 1, 128, 32768))
LONGEST = Case("", gradients("tpu"), operands(4, 1, 128, 131072))


def test_a_forward_kernel_compiles(absent_tpus):
    query, key, *_ = operands(4, 1, 80, 1000)
    intervals = jax.ShapeDtypeStruct((1, 1000, 2), jnp.int32)

    def function(query, key, value, intervals):
        return tpu.forward(query, key, value, intervals, scale=0.1, softcap=None)

    compile_for("v5e", function, query, key, key, intervals)


@pytest.mark.slow
@pytest.mark.parametrize("family", FORWARD)
def test_models_shapes_fit_and_keep_the_matrix_units_busy(family, absent_tpus):
    found = reports(family, [f"flash_attention/tpu/{model}" for model in MODELS])
    for name, report in found.items():
        assert "error" not in report, (name, report)
        forward, backward = report["kernels"]
        assert "forward" in forward["name"] and "backward" in backward["name"]
        capped = "softcap" in MODELS[name.split("/")[-1]][3]
        least = (FORWARD_CAPPED if capped else FORWARD)[family]
        assert forward["shares"]["MXU"] >= least and backward["shares"]["MXU"] >= BACKWARD, (name, report)
        for kernel in (forward, backward):
            assert kernel["vmem_bytes"] < CHIPS[TARGETS[family].device_kind].vmem_bytes


@pytest.mark.slow
@pytest.mark.parametrize("family", FORWARD)
def test_other_types_widths_and_lengths_compile(family, absent_tpus):
    found = reports(family, [f"{__name__}:{name}" for name in ("FLOAT32", "HALF_LANES", "LONG", "LONGEST")])
    assert [report.get("error") for report in found.values()] == [None] * 4
    assert [len(report["kernels"]) for report in found.values()] == [2, 2, 2 if family != "v5p" else 3, 3]
