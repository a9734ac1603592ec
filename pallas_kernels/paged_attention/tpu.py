"""The core on TPUs, in Pallas: how a call is laid out for the kernel, and its sizes.

Without a fixed order of summation, segments of one row and of many go to two calls of the same kernel, with small and
large tiles, which write their own rows of one result. In a fixed order there is one call, whose matrix products all
have the same shape; a tile computes as many of them as it has rows.

The kernel takes a cache as XLA lays it out, which for keys and values costs no copy whatever their shape. The scales of
a quantized cache it takes without one where ``page_size`` is a multiple of 128; of smaller pages XLA makes the page
number the innermost axis, and neither this kernel nor `write`'s scatter works in that layout.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import CHIPS
from pallas_kernels.paged_attention import tpu_tiles as tiles
from pallas_kernels.paged_attention.segments import Carry, ordered_block
from pallas_kernels.paged_attention.tpu_heads import interleaved, words
from pallas_kernels.paged_attention.tpu_kernel import LANES, LOG2E, Sizes, kernel, scratch_shapes
from pallas_kernels.platform import chip, platform
from pallas_kernels.tuning import tuned

_MIB = 2**20
# What a chip has that `CHIPS` does not name.
_SMALLEST_VMEM = 16 * _MIB
# Keys and values of a block, together, and what keeps a matrix unit busy: rows of a tile, times the group.
_BLOCK_BYTES, _TILE_ROWS, _COMPUTE = 2 * _MIB, 512, 512
# Numbers of keys that one stretch of code unpacks.
_UNPACKED = 2**18
# Rows of every matrix product of the fixed order, times the group: a decode pays for all, prefill would like more.
_ORDERED_ROWS = 32
_SUBLANES = 8


@dataclasses.dataclass(frozen=True)
class TpuConfig:
    """Sizes of the kernel.

    Attributes:
      block: tokens fetched at a time, whole pages and a multiple of 128; two such blocks are held, of keys and values.
      compute: tokens multiplied at a time; divides ``block``. In a fixed order it is
        `pallas_kernels.paged_attention.segments.ordered_block`, whatever is said here.
      rows: query rows of a tile where a segment has many; a power of two.
      ordered_rows: rows of every matrix product of the fixed order; a power of two that divides ``rows``.
      cores: that share the work.
    """

    block: int = 256
    compute: int = 256
    rows: int = 128
    ordered_rows: int = 8
    cores: int = 1

    def __post_init__(self) -> None:
        for name in ("block", "compute"):
            if getattr(self, name) < 1 or getattr(self, name) % LANES:
                raise ValueError(f"TpuConfig.{name}={getattr(self, name)}: must be a positive multiple of {LANES}")
        for name in ("rows", "ordered_rows"):
            size = getattr(self, name)
            if size < 1 or size & (size - 1):
                raise ValueError(f"TpuConfig.{name}={size}: must be a power of two")
        if self.block % self.compute:
            raise ValueError(f"TpuConfig.compute={self.compute}: must divide block={self.block}")
        if self.rows % self.ordered_rows:
            raise ValueError(f"TpuConfig.ordered_rows={self.ordered_rows}: must divide rows={self.rows}")
        if self.cores < 1:
            raise ValueError(f"TpuConfig.cores={self.cores}: must be at least 1")


def why_not(query, cache, *, decode) -> str | None:
    """Why the kernel does not support a case, a sentence that names the argument; ``None``: it does."""
    del decode
    _, _, page_size, kv_heads, head_dim = cache.key.shape
    if query.dtype.name not in ("bfloat16", "float32"):
        return f"query has dtype {query.dtype.name}; the kernel takes bfloat16 and float32"
    if cache.key.dtype.name == "float16":
        return "cache.key has dtype float16, which TPUs do not compute with"
    if page_size < _SUBLANES or page_size & (page_size - 1):
        return f"cache.key has page_size {page_size}; the kernel takes powers of two from {_SUBLANES} on"
    if not interleaved(kv_heads, cache.key.dtype) and page_size % (_SUBLANES * words(cache.key.dtype)):
        return (
            f"cache.key has page_size {page_size}, with {kv_heads} kv_heads of {cache.key.dtype.name} the kernel takes "
            f"multiples of {_SUBLANES * words(cache.key.dtype)}"
        )
    if head_dim > 2 * LANES or head_dim % _SUBLANES:
        return f"query has head_dim {head_dim}; the kernel takes multiples of {_SUBLANES} up to {2 * LANES}"
    return None


def heuristic(query: Any, cache: Any, device_kind: str | None = None) -> TpuConfig:
    """Sizes for a case from its shapes alone.

    Blocks of two megabytes are more than device memory needs to be read at its full rate; 512 rows (group times query
    rows) against 512 tokens keep the matrix units busy nearly all the time.
    """
    _, _, page_size, kv_heads, head_dim = cache.key.shape
    group = _padded_group(query.shape[1] // kv_heads)
    token_bytes = 2 * kv_heads * -(-head_dim // LANES) * LANES * cache.key.dtype.itemsize
    unit = max(LANES, page_size)
    block = max(unit, min(_power_of_two(_BLOCK_BYTES // token_bytes), 2048) // unit * unit)
    compute = math.gcd(block, _COMPUTE)
    rows = max(1, _TILE_ROWS // group)
    ordered_rows = max(1, _ORDERED_ROWS // group)
    known = CHIPS.get(device_kind) if device_kind else None
    return TpuConfig(block, compute, rows, ordered_rows, 1 if known is None else known.cores)


def attend(
    query,
    position,
    cache,
    layer,
    block_table,
    segments,
    *,
    outputs,
    decode,
    window,
    scale,
    softcap,
    carry=None,
    ordered=False,
    config=None,
):
    """See `pallas_kernels.paged_attention.segments`.

    Raises:
      ValueError: a ``config`` that does not suit the page size, or blocks that do not fit the chip's vector memory.
    """
    kind = chip()
    if config is None:
        config = heuristic(query, cache, kind)
        found = tuned(
            "paged_attention",
            kind,
            cache.key.dtype,
            kv_heads=cache.key.shape[3],
            group=query.shape[1] // cache.key.shape[3],
            head_dim=query.shape[2],
            page_size=cache.page_size,
        )
        config = config if found is None else dataclasses.replace(config, **found)
    call = _Call(query, position, cache, layer, block_table, segments, outputs, window, scale, softcap, config, kind)
    if ordered:
        rows = config.ordered_rows if decode else config.rows
        sizes = call.sizes(rows, config.ordered_rows, ordered=True, single=decode)
        return call.carry_of(call.run(sizes, segments.query_count, call.state_of(carry)))
    small = call.sizes(max(1, _SUBLANES // call.group), None, ordered=False, single=True)
    if decode:
        return finish(call.carry_of(call.run(small, segments.query_count, None)))
    one = segments.query_count == 1
    state = call.run(small, jnp.where(one, 1, 0), None)
    large = call.sizes(config.rows, None, ordered=False, single=False)
    return finish(call.carry_of(call.run(large, jnp.where(one, 0, segments.query_count), state)))


def finish(carry):
    """The output and its log-sum-exp, from a `Carry` whose ``peak`` is in base two."""
    out = carry.total / jnp.where(carry.weight == 0, 1.0, carry.weight)[..., None]
    return out, carry.peak / LOG2E + jnp.log(carry.weight)


@dataclasses.dataclass(frozen=True)
class _Call:
    """The operands of `attend`, and how they are laid out for the kernel."""

    query: Any
    position: Any
    cache: Any
    layer: Any
    block_table: Any
    segments: Any
    outputs: int
    window: Any
    scale: float
    softcap: float | None
    config: TpuConfig
    kind: str | None

    @property
    def kv_heads(self) -> int:
        return self.cache.key.shape[3]

    @property
    def heads_per_group(self) -> int:
        return self.query.shape[1] // self.kv_heads

    @property
    def group(self) -> int:
        return _padded_group(self.heads_per_group)

    def sizes(self, rows: int, chunk: int | None, *, ordered: bool, single: bool) -> Sizes:
        """Of a launch with tiles of so many rows, of which but a ``single`` one is used."""
        key, config = self.cache.key, self.config
        page_size = key.shape[2]
        unit = ordered_block(page_size) if ordered else page_size
        if config.block % unit:
            raise ValueError(
                f"TpuConfig.block={config.block}: must be a multiple of {unit} for pages of {page_size} tokens"
            )
        wide = jnp.float32 in (self.query.dtype, key.dtype)
        compute_dtype = jnp.float32 if wide else jnp.bfloat16
        packed = self.group % words(compute_dtype) == 0
        return Sizes(
            kv_heads=self.kv_heads,
            group=self.group,
            head_dim=key.shape[4],
            page_size=page_size,
            table_width=self.block_table.shape[1],
            rows=rows,
            chunk=rows if chunk is None else chunk,
            most=1 if single else min(rows, _power_of_two(min(self.query.shape[0], self.outputs))),
            block=config.block,
            compute=unit if ordered else self.compute(single),
            interleaved=interleaved(self.kv_heads, key.dtype),
            quantized=self.cache.quantized,
            ordered=ordered,
            cache_dtype=key.dtype,
            query_dtype=compute_dtype if packed else jnp.float32,
            compute_dtype=compute_dtype,
            softcap=self.softcap,
            compiled=platform() == "tpu",
        )

    def compute(self, single: bool) -> int:
        """Tokens multiplied at a time; with few rows all heads' at once, which must not make endless code."""
        _, _, _, kv_heads, head_dim = self.cache.key.shape
        most = max(LANES, _power_of_two(_UNPACKED // (kv_heads * head_dim)))
        return math.gcd(self.config.compute, most) if single else self.config.compute

    def run(self, s: Sizes, counts: Any, state: Any) -> tuple[Any, Any]:
        """The kernel on those segments that have a count; writes into ``state`` where that is given."""
        work = tiles.make_tiles(
            self.segments,
            counts,
            self.position,
            self.window,
            rows=s.rows,
            capacity=counts.shape[0] + (0 if s.most == 1 else self.outputs // s.rows),
            page_size=s.page_size,
            block=s.block,
            ordered=s.ordered,
            cores=self.config.cores,
        )
        window = tiles.NO_WINDOW if self.window is None else self.window
        scalars = jnp.stack([jnp.asarray(x, jnp.int32) for x in (self.layer, window)])
        cache = [self.cache.key, self.cache.value]
        if not s.interleaved:  # as they lie in memory: no copy
            cache = [jnp.swapaxes(x, 2, 3) for x in cache]
        if s.quantized:
            cache += [self.cache.key_scale, self.cache.value_scale]
        position = jnp.broadcast_to(self.position[:, None, None], (self.position.shape[0], s.group, LANES))
        operands = [self.block_table[:, None, :], position, self.query_of(s), *cache, *(state or ())]
        scratch = scratch_shapes(s)
        limit = self.vmem_limit(scratch)
        any_space = pl.BlockSpec(memory_space=pl.ANY)
        prefetched = 3
        first_state = prefetched + len(operands) - 2
        results = (
            jax.ShapeDtypeStruct((s.kv_heads, self.outputs, s.group, s.head_dim), jnp.float32),
            jax.ShapeDtypeStruct((s.kv_heads, self.outputs, s.group, LANES), jnp.float32),
        )
        return pl.pallas_call(
            functools.partial(kernel, sizes=s, aliased=state is not None, names=tuple(scratch)),
            out_shape=results,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=prefetched,
                grid=(self.config.cores,),
                in_specs=[any_space] * len(operands),
                out_specs=(any_space, any_space),
                scratch_shapes=list(scratch.values()),
            ),
            input_output_aliases={} if state is None else {first_state: 0, first_state + 1: 1},
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel",),
                vmem_limit_bytes=limit,
                disable_bounds_checks=True,  # they cost more scalar work than the copies of pages
            ),
            interpret=platform() != "tpu",
            name="paged_attention_ordered" if s.ordered else f"paged_attention_{s.rows}",
        )(work.bounds, work.table, scalars, *operands)

    def query_of(self, s: Sizes) -> Any:
        """``[kv_heads, rows, group, head_dim]``, scaled so that products with keys are scores in base two.

        With soft-capping they are the argument of its tangent.
        """
        factor = self.scale * LOG2E if self.softcap is None else self.scale / self.softcap
        q = (self.query.astype(jnp.float32) * factor).astype(s.compute_dtype).astype(s.query_dtype)
        return self.grouped(q)

    def grouped(self, x: Any) -> Any:
        """``[rows, heads, *rest]`` as ``[kv_heads, rows, group, *rest]``."""
        x = x.reshape(x.shape[0], self.kv_heads, self.heads_per_group, *x.shape[2:])
        x = jnp.pad(x, ((0, 0), (0, 0), (0, self.group - self.heads_per_group), *((0, 0),) * (x.ndim - 3)))
        return jnp.swapaxes(x, 0, 1)

    def rows_first(self, x: Any) -> Any:
        """Back from `grouped`."""
        x = jnp.swapaxes(x[:, :, : self.heads_per_group], 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    def state_of(self, carry: Carry) -> tuple[Any, Any]:
        """A carry as the kernel holds it: the weights in the low lanes of one array, the peaks in the high ones."""
        weight, peak = (jnp.broadcast_to(x[..., None], (*x.shape, LANES // 2)) for x in (carry.weight, carry.peak))
        return self.grouped(carry.total), self.grouped(jnp.concatenate([weight, peak], axis=-1))

    def carry_of(self, state: tuple[Any, Any]) -> Carry:
        """Back from `state_of`."""
        return Carry(self.rows_first(state[0]), *(self.rows_first(state[1][..., i]) for i in (0, LANES // 2)))

    def vmem_limit(self, scratch: dict[str, Any]) -> int:
        """Bytes that the kernel may use; refuses what cannot fit."""
        held = sum(_padded_bytes(x) for x in scratch.values() if getattr(x, "memory_space", None) == pltpu.VMEM)
        known = CHIPS.get(self.kind) if self.kind else None
        vmem = _SMALLEST_VMEM if known is None else known.vmem_bytes
        # Beside what the kernel names, the compiler keeps values there that registers cannot hold.
        if held > vmem * 3 // 4 and platform() == "tpu":
            raise ValueError(
                f"TpuConfig {self.config} needs {held} bytes of vector memory, and {self.kind} has {vmem}; "
                "take smaller blocks or fewer rows"
            )
        return vmem * 9 // 10


def _padded_group(group: int) -> int:
    """Sublanes of a row's group: a power of two, so that rows are whole tiles."""
    return 1 << (group - 1).bit_length()


def _power_of_two(x: int) -> int:
    return 1 << max(x, 1).bit_length() - 1


def _padded_bytes(x: Any) -> int:
    *rest, sublanes, lanes = x.shape
    itemsize = jnp.dtype(x.dtype).itemsize
    return math.prod(rest) * -(-sublanes // words(x.dtype)) * words(x.dtype) * -(-lanes // LANES) * LANES * itemsize
