"""The GPU kernels on a GPU: the sweep of the interpreter's tests, longer, and what only a device can show."""

import gpu_flash_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.flash_attention import flash_attention, gpu
from pallas_kernels.flash_attention.intervals import self_intervals

pytestmark = pytest.mark.gpu

SHAPES = {
    f"{head_dim} {dtype.__name__} {group} {softcap} {length}": cases.Shape(
        head_dim=head_dim, queries=length, keys=length, heads=2 * group, kv_heads=2, dtype=dtype, softcap=softcap
    )
    for head_dim in (64, 96, 128, 192, 256)
    for dtype in (jnp.bfloat16, jnp.float16)
    for group, softcap, length in ((1, None, 1024), (4, None, 777), (3, 5.0, 129))
} | {
    "other keys": cases.Shape(queries=300, keys=1000, heads=4, kv_heads=2),
    "float32 out": cases.Shape(queries=513, keys=513, head_dim=128, out_dtype=jnp.float32),
    "one token": cases.Shape(queries=1, keys=1),
}


@pytest.mark.parametrize("name", SHAPES)
def test_kernels_give_what_the_formula_gives(name):
    shape = SHAPES[name]
    with jax.default_matmul_precision("highest"):
        programs = cases.programs(shape)
        for mask in cases.masks(shape.queries, shape.keys, shape.batch).values():
            cases.check(shape, *programs, mask)


@pytest.mark.parametrize("head_dim", (64, 128, 256))
def test_gradients_are_the_same_bits_every_time(head_dim):
    shape = cases.Shape(queries=4096, keys=4096, heads=8, kv_heads=2, head_dim=head_dim)
    q, k, v, dout, delta = shape.operands()
    forward, backward = cases.programs(shape)
    mask = self_intervals(4096)
    out, lse = forward(q, k, v, mask)
    first = backward(q, k, v, lse, delta, dout, mask)
    for _ in range(5):
        assert all(np.array_equal(x, y) for x, y in zip(forward(q, k, v, mask), (out, lse), strict=True))
        again = backward(q, k, v, lse, delta, dout, mask)
        assert all(np.array_equal(x, y) for x, y in zip(again, first, strict=True))


def test_probabilities_in_registers_are_those_in_shared_memory():
    """Where the assembler corrupts a matmul whose left operand is in registers, they are not."""
    shape = cases.Shape(queries=2048, keys=2048, heads=8, head_dim=128, config=gpu.GpuConfig(registers=True))
    forward, backward = cases.programs(shape)
    for mask in cases.masks(2048, 2048, 2).values():
        cases.check(shape, forward, backward, mask)


def test_under_remat_and_scan():
    q, k, v, dout, _ = cases.Shape(queries=300, keys=300, heads=4, kv_heads=2, head_dim=128).operands()

    def loss(implementation, *operands):
        q, k, v = operands

        @jax.checkpoint
        def layer(x, _):
            return x + flash_attention(x, k, v, window=100, implementation=implementation), None

        return jnp.sum(jax.lax.scan(layer, q, length=3)[0].astype(jnp.float32) * dout.astype(jnp.float32))

    mine = jax.jit(jax.grad(lambda *x: loss("gpu", *x), (0, 1, 2)))(q, k, v)
    theirs = jax.grad(lambda *x: loss("reference", *x), (0, 1, 2))(*(x.astype(jnp.float32) for x in (q, k, v)))
    for own, other in zip(mine, theirs, strict=True):
        assert np.abs(np.asarray(own, np.float32) - other).max() < 0.03 * np.abs(other).max()
