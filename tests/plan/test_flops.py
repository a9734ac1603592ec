"""FLOPs of traced programs, against what a product costs."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType, PartitionSpec

from ml.plan.flops import computed_flops

W, X = jnp.zeros((16, 32)), jnp.zeros((8, 16))
ONE = 2 * 8 * 16 * 32


def flops(function, *args, share=1.0):
    return computed_flops(jax.jit(function).trace(*args).jaxpr, share)


def test_a_product_and_its_derivative():
    assert flops(lambda x, w: x @ w, X, W) == ONE
    assert flops(jax.grad(lambda w, x: jnp.square(x @ w).sum(), (0, 1)), W, X) == 3 * ONE


def test_loops_branches_and_rematerialization():
    assert (
        flops(lambda w, x: jax.lax.scan(lambda c, _: (c + x @ w, None), jnp.zeros((8, 32)), length=5)[0], W, X)
        == 5 * ONE
    )
    branch = lambda w, x: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: (x + x) @ w + x @ w)  # noqa: E731
    assert flops(branch, W, X) == 2 * ONE

    def loss(w, x):
        body = jax.checkpoint(lambda x: jnp.sin(jnp.sin(x @ w) @ w.T))
        return jax.lax.scan(lambda c, _: (body(c), None), x, length=3)[0].sum()

    # Forward; again, but for the last product, of which only the sine's argument is needed; two for each backward.
    assert flops(jax.grad(loss), W, X) == 3 * (2 + 2 + 4) * ONE


def test_grouped_products_count_a_row_once():
    w, sizes = jnp.zeros((4, 16, 32)), jnp.array([2, 2, 2, 2])
    assert flops(lambda x, w: jax.lax.ragged_dot(x, w, sizes), X, w) == ONE
    gradients = jax.grad(lambda x, w: jnp.square(jax.lax.ragged_dot(x, w, sizes)).sum(), (0, 1))
    assert flops(gradients, X, w) == 3 * ONE


def test_shards_and_kernels_are_multiplied():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": (PartitionSpec("data"), PartitionSpec()), "out_specs": PartitionSpec("data")}
    assert flops(jax.shard_map(lambda x, w: x @ w, mesh=mesh, **specs), X, W) == ONE

    def kernel(x, w, out):
        out[...] = x[...] @ w[...]

    call = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((8, 32), jnp.float32),
        grid=(2,),
        in_specs=[pl.BlockSpec((4, 16), lambda i: (i, 0)), pl.BlockSpec((16, 32), lambda i: (0, 0))],
        out_specs=pl.BlockSpec((4, 32), lambda i: (i, 0)),
        interpret=True,
    )
    assert flops(call, X, W) == ONE
    assert flops(call, X, W, share=0.25) == pytest.approx(ONE / 4)


def test_what_nothing_reads_is_not_computed():
    def unread(x, w):
        dropped, _ = jax.vjp(jnp.matmul, x, w)
        return jax.jit(lambda x: (x @ w, x.sum()))(x)[1] + 0 * x.sum(), dropped

    assert flops(lambda x, w: unread(x, w)[0], X, W) == 0
    assert flops(unread, X, W) == ONE
