"""How the TPU kernels are launched: layouts of operands, blocks by the list of steps, and the call itself."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.flash_attention import tpu_tiles as tiles
from pallas_kernels.flash_attention.tpu_config import vmem_limit
from pallas_kernels.platform import platform

# Batch and heads are independent; steps, and the heads of a group, add to one sum.
_SEMANTICS: tuple[Any, ...] = ("parallel", "parallel", "arbitrary", "arbitrary")


class _Place(NamedTuple):
    """Where a step of the grid is."""

    entry: Any
    interval_entry: Any
    head: Any
    kv_head: Any
    q_tile: Any
    kv_tile: Any


class Specs(NamedTuple):
    """Blocks of operands ``[batch, heads, rows, head_dim]`` for a grid ``(batch, heads, steps)``, or, if ``grouped``,
    ``(batch, kv_heads, steps, heads that share a key)``.

    Attributes:
      group: query heads that share a key.
      block_q, block_kv: a tile.
      width: head size.
      queries_major: steps add to a tile of queries, not of keys.
    """

    group: int
    block_q: int
    block_kv: int
    width: int
    queries_major: bool = True
    grouped: bool = False

    def queries(self) -> pl.BlockSpec:
        """Of ``[batch, heads, queries, width]``, a tile."""
        return self._spec((None, None, self.block_q, self.width), lambda at: (at.entry, at.head, at.q_tile, 0))

    def keys(self) -> pl.BlockSpec:
        """Of ``[batch, kv_heads, keys, width]``, a tile."""
        return self._spec((None, None, self.block_kv, self.width), lambda at: (at.entry, at.kv_head, at.kv_tile, 0))

    def rows(self, count: int) -> pl.BlockSpec:
        """Of ``[batch, heads, count, queries]``, what is kept of each query."""
        return self._spec((None, None, count, self.block_q), lambda at: (at.entry, at.head, 0, at.q_tile))

    def intervals(self) -> pl.BlockSpec:
        """Of ``[batch or 1, 2, queries]``, first and last key of each query of a tile."""
        return self._spec((None, 2, self.block_q), lambda at: (at.interval_entry, 0, at.q_tile))

    def queries_of_group(self) -> pl.BlockSpec:
        """Of ``[batch, kv_heads, group, queries, width]``, a tile of all heads that share a key."""
        shape = (None, self.group, self.block_q, self.width)
        return self._spec(shape, lambda at: (at.entry, at.kv_head, at.q_tile, 0))

    def all_keys(self, keys: int) -> pl.BlockSpec:
        """Of ``[batch, kv_heads, keys, width]``, all keys of a head."""
        return self._spec((None, None, keys, self.width), lambda at: (at.entry, at.kv_head, 0, 0))

    def _spec(self, shape: tuple[int | None, ...], index: Callable[[_Place], tuple]) -> pl.BlockSpec:
        def at(b, h, t, *rest):
            *member, majors, minors = rest
            entry, own, read = tiles.batch_of(majors[t]), tiles.major_of(majors[t]), tiles.minor_of(minors[t])
            head, kv_head = (h * self.group + member[0], h) if self.grouped else (h, jax.lax.div(h, self.group))
            q_tile, kv_tile = (own, read) if self.queries_major else (read, own)
            return index(_Place(b + entry, entry, head, kv_head, q_tile, kv_tile))

        return pl.BlockSpec(shape, at)


def launch(
    kernel: Callable[..., None],
    name: str,
    steps: tiles.Steps,
    grid: tuple[Any, ...],
    operands: Sequence[jax.Array],
    in_specs: Sequence[pl.BlockSpec],
    out_shapes: Sequence[tuple[tuple[int, ...], Any]],
    out_specs: Sequence[pl.BlockSpec],
    scratch: Sequence[Any],
) -> Sequence[jax.Array]:
    """Runs a kernel over a grid whose first two axes are independent; off a TPU, in the interpreter.

    Args:
      kernel: of the words of the steps, the operands' blocks, the results' and the scratch.
      out_shapes: shapes and types.
    """
    return pl.pallas_call(
        kernel,
        out_shape=[_varying_like(operands, shape, dtype) for shape, dtype in out_shapes],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2, grid=grid, in_specs=in_specs, out_specs=out_specs, scratch_shapes=scratch
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=_SEMANTICS[: len(grid)],
            vmem_limit_bytes=vmem_limit(),
        ),
        interpret=platform() != "tpu",
        name=name,
    )(steps.major, steps.minor, *operands)


def when_seen(step: Any) -> Callable[[Callable[[bool], None]], None]:
    """Runs a function of a tile with or without mask, or not at all, by what the step's flags say."""

    def define(function: Callable[[bool], None]) -> None:
        pl.when(step & tiles.FULL != 0)(lambda: function(False))
        pl.when(step & tiles.MASKED != 0)(lambda: function(True))

    return define


def padded_intervals(
    intervals: Int[Array, "batch queries 2"], block_q: int, keys: int
) -> Int[Array, "batch padded_queries 2"]:
    """Whole tiles of queries, within the keys. Padding repeats the last row: its results are dropped."""
    intervals = jnp.clip(jnp.asarray(intervals, jnp.int32), 0, keys)
    return jnp.pad(intervals, ((0, 0), (0, -intervals.shape[1] % block_q), (0, 0)), mode="edge")


def starts_and_counts(intervals: Int[Array, "batch queries 2"]) -> Int[Array, "batch 2 queries"]:
    """First key that each query sees, and how many."""
    start, stop = intervals[..., 0], intervals[..., 1]
    return jnp.stack([start, jnp.maximum(stop - start, 0)], axis=1)


def heads_first(x: Float[Array, "batch rows heads *rest"], block: int) -> Float[Array, "batch heads padded_rows *rest"]:
    """Whole tiles of rows, the rest zeros; on a TPU the layout that the producer writes."""
    extra = -x.shape[1] % block
    x = jnp.swapaxes(x, 1, 2)
    return jnp.pad(x, ((0, 0), (0, 0), (0, extra), *((0, 0),) * (x.ndim - 3))) if extra else x


def queries_first(
    x: Float[Array, "batch heads padded_rows *rest"], rows: int
) -> Float[Array, "batch rows heads *rest"]:
    """Back from `heads_first`."""
    return jnp.swapaxes(x[:, :, :rows], 1, 2)


def _varying_like(operands: Sequence[jax.Array], shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """Within a `shard_map` results differ over the axes over which an operand does, and must say so."""
    kinds = [jax.typeof(x).manual_axis_type for x in operands]
    varying = frozenset().union(*(kind.varying for kind in kinds))
    if not varying:
        return jax.ShapeDtypeStruct(shape, dtype)
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=type(kinds[0])(varying=varying))
