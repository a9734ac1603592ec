"""What the GPU kernels of flash attention are tried on: masks and arguments for the interpreter and for a GPU."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.flash_attention import gpu, reference
from pallas_kernels.flash_attention.intervals import self_intervals
from pallas_kernels.flash_attention.vjp import row_delta


@dataclasses.dataclass(frozen=True)
class Shape:
    """Arguments but for the mask; see `gpu.forward`."""

    head_dim: int = 64
    queries: int = 130
    keys: int = 130
    heads: int = 2
    kv_heads: int = 1
    batch: int = 2
    dtype: Any = jnp.bfloat16
    out_dtype: Any = None
    softcap: float | None = None
    config: gpu.GpuConfig | None = None

    @property
    def options(self):
        return {
            "scale": 1.5 * self.head_dim**-0.5,
            "softcap": self.softcap,
            "out_dtype": self.out_dtype,
            "config": self.config,
        }

    def operands(self):
        """Query, key, value, and the gradients of the output and of the log-sum-exp."""
        rng = np.random.default_rng(self.queries + self.head_dim)
        rows = (self.batch, self.queries, self.heads)
        kv = (self.batch, self.keys, self.kv_heads, self.head_dim)
        q, k, v, dout = (rng.normal(size=x) for x in ((*rows, self.head_dim), kv, kv, (*rows, self.head_dim)))
        return *(jnp.asarray(x, self.dtype) for x in (q, k, v, dout)), jnp.asarray(rng.normal(size=rows), jnp.float32)


def masks(queries: int, keys: int, batch: int) -> dict[str, np.ndarray]:
    """Intervals by name, all of one shape, so that one program takes them all."""
    rng = np.random.default_rng(0)
    start = rng.integers(0, keys + 1, (batch, queries))
    anything = np.stack([start, np.minimum(start + rng.integers(-9, keys, (batch, queries)), keys)], -1)
    few = np.where(rng.random((batch, queries, 1)) < 0.05, anything, 0)
    nothing = np.zeros((batch, queries, 2))
    one = nothing + np.array([keys // 2, keys // 2 + 1])
    found = {"anything": anything, "few rows see": few, "one key": one, "nothing": nothing}
    found["all"] = nothing + np.array([0, keys])
    if queries == keys:
        segments = np.sort(rng.integers(0, 5, (batch, queries)), axis=1)
        found["causal"] = self_intervals(queries)
        found["window"] = self_intervals(queries, window=33)
        found["segments"] = self_intervals(queries, segment_ids=segments)
    return {name: np.broadcast_to(x, (batch, queries, 2)).astype(np.int32) for name, x in found.items()}


def finished(function):
    """The function compiled, to be called alone: the interpreter's own calls of JAX wait for what is under way."""
    compiled = jax.jit(function)
    return lambda *operands: jax.block_until_ready(compiled(*jax.block_until_ready(operands)))


def programs(shape: Shape):
    """The kernels for a shape, as functions of operands and mask."""
    forward = finished(lambda *operands: gpu.forward(*operands, **shape.options))
    return forward, finished(lambda *operands: gpu.backward(*operands, **shape.options))


def check(shape: Shape, forward, backward, mask) -> None:
    """Holds both passes against the float32 reference and its derivative."""
    q, k, v, dout, dlse = shape.operands()
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    exact = lambda *x: reference.flash_attention(*x, mask, scale=shape.options["scale"], softcap=shape.softcap)  # noqa: E731
    (out, lse), derivative = jax.vjp(exact, *wide)
    blind = np.isneginf(lse)
    dlse = jnp.where(blind, 0.0, dlse)

    own_out, own_lse = forward(q, k, v, mask)
    assert own_out.dtype == (shape.out_dtype or shape.dtype) and own_lse.dtype == jnp.float32
    assert own_out.shape == q.shape and own_lse.shape == q.shape[:-1]
    close(own_out, out)
    assert np.array_equal(np.isneginf(own_lse), blind) and not np.isnan(own_lse).any()
    assert np.abs(np.where(blind, 0.0, own_lse - lse)).max() < 1e-4
    assert not np.asarray(own_out, np.float32)[blind].any(), "rows that see nothing have output 0"

    delta = row_delta(out, dout, dlse)
    own = backward(q, k, v, lse, delta, dout, mask)
    for mine, theirs, operand in zip(own, derivative((dout.astype(jnp.float32), dlse)), (q, k, v), strict=True):
        assert mine.dtype == (shape.out_dtype or shape.dtype) and mine.shape == operand.shape
        close(mine, theirs)


def close(mine, theirs) -> None:
    """To 1% of the largest, and on the whole to much less."""
    mine, theirs = np.asarray(mine, np.float32), np.asarray(theirs, np.float32)
    assert np.isfinite(mine).all()
    largest, error = np.abs(theirs).max(), np.abs(mine - theirs)
    assert error.max() <= 0.01 * largest
    assert np.sqrt(np.square(error).mean()) <= 0.005 * np.sqrt(np.square(theirs).mean())
