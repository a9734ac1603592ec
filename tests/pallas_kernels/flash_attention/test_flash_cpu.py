"""The kernel for CPUs: against float64, and gradients against those of the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_flash_xla import SHAPES, TILES, distance, finite, gradients, inputs, oracle

from pallas_kernels.flash_attention import cpu, flash_attention, own_backend

FITTING = {name: shape for name, shape in (SHAPES | TILES).items() if shape[4] % 16 == 0}


@pytest.mark.parametrize("name", FITTING)
def test_equals_float64_and_the_gradient_of_the_formula(name):
    tensors, _, intervals = inputs(name)
    got, (out, lse) = gradients(name, jnp.asarray(intervals), implementation="cpu")
    expected = oracle(*tensors, intervals, FITTING[name][5])
    np.testing.assert_allclose(out, expected[0], atol=2e-5)
    np.testing.assert_allclose(lse, expected[1], atol=2e-5)
    assert np.isneginf(lse[:, FITTING[name][0] // 2]).all()
    assert distance(got, gradients(name, implementation="reference")[0]) < 2e-5


MUTANTS = {
    "a tile's queries see what its first sees": ("tile.high[v] - begin", "tile.high[0] - begin"),
    "a tile of queries is another's": ("x.queries + first + v", "x.queries + v"),
    "a sequence has the first one's keys": ("start = sequence * x.keys", "start = 0 * x.keys"),
    "the mask is dropped in the backward pass": ("std::fill(x + high, x + kBlock, 0.0f);", ""),
    "delta is left out": ("(Load(products + i) - delta)", "Load(products + i)"),
    "the slope of the soft-cap is left out": ("slope = 1.0f - bounded * bounded;", ""),
    "the last queries of a tile add nothing to the keys": (
        "&dlogits[t], sees, tile.query, tile.rows", "&dlogits[t], sees, tile.query, tile.rows - 1"
    ),
    "a block of keys has the first one's values": ("x.keys + begin + std::min(t", "x.keys + std::min(t"),
    "queries of the second tile on get the first one's gradient": ("&dquery[(i * kPadded + r) * d]", "&dquery[r * d]"),
}  # fmt: skip


@pytest.mark.sweep("delta is left out")
@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_are_noticed(mutate, name):
    mutate(cpu, "flash_attention", *MUTANTS[name])
    shape = "tiles_softcap" if "soft-cap" in name else "tiles"
    got, results = gradients(shape, implementation="cpu")
    expected, reference = gradients(shape, implementation="reference")
    assert not (distance(got, expected) < 1e-3 and distance(finite(results), finite(reference)) < 1e-3)


def test_mapped_over_all_operands():
    """Axes before the others, also of one mask for all of a batch, are more of a batch."""
    (q, k, v), _, intervals = inputs("one_tile")
    operands = [jnp.stack([x, x[::-1], 2 * x]) for x in (q, k, v)]
    masks = jnp.stack([intervals[:1], intervals[1:], intervals[:1]])

    def gradient(implementation):
        def attend(q, k, v, mask):
            return jnp.sin(flash_attention(q, k, v, intervals=mask, implementation=implementation)).sum()

        return jax.vmap(jax.grad(attend, (0, 1, 2)))(*operands, masks)

    assert distance(gradient("cpu"), gradient("reference")) < 2e-5


def test_what_it_does_not_support():
    def refused(message, *shapes, **options):
        x = [jnp.zeros((1, 4, 2, width), dtype) for width, dtype in shapes]
        with pytest.raises(ValueError, match=f"implementation='cpu' does not support this: {message}"):
            flash_attention(*x, implementation="cpu", **options)
        if not options:
            assert own_backend("auto", *x, softcap=None) == "xla"

    refused("query has head_dim 24, which is not a multiple of 16", *[(24, "float32")] * 3)
    refused("query has dtype float16; it takes float32 and bfloat16", *[(16, "float16")] * 3)
    refused("key has dtype bfloat16 and value float32", (16, "float32"), (16, "bfloat16"), (16, "float32"))
    refused("config=3; nothing of it can be configured", *[(16, "float32")] * 3, config=3)
