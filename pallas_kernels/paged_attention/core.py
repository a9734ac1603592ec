"""Chooses the backend of the core and gives each device its own heads."""

import importlib
from typing import Any, Literal, cast

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.fallback import choose
from pallas_kernels.paged_attention.cache import PagedCache
from pallas_kernels.paged_attention.segments import Carry, Segments
from pallas_kernels.platform import platform
from pallas_kernels.sharded import on_shards

Implementation = Literal["auto", "xla", "cpu", "gpu", "tpu", "reference"]
IMPLEMENTATIONS = ("xla", "cpu", "gpu", "tpu", "reference")
_KERNELS = ("cpu", "gpu", "tpu")  # the names of their platforms


Result = tuple[Float[Array, "outputs heads head_dim"], Float[Array, "outputs heads"]]


def attend_segments(
    query: Float[Array, "rows heads head_dim"],
    position: Int[Array, " rows"],
    cache: PagedCache,
    layer: int | Int[Array, ""],
    block_table: Int[Array, "sequences pages_per_sequence"],
    segments: Segments,
    *,
    outputs: int,
    decode: bool,
    window: int | Int[Array, ""] | None = None,
    scale: float,
    softcap: float | None = None,
    implementation: Implementation = "auto",
    config: Any = None,
) -> Result:
    """Attends as `pallas_kernels.paged_attention.segments` says, through one of the backends.

    Args:
      query: rows, grouped heads.
      position: of each row in its sequence; negative: sees nothing.
      cache: keys and values of all layers.
      layer: which layer.
      block_table: rows that the segments refer to.
      segments: the work.
      outputs: rows of the result.
      decode: every segment has one row at most.
      window, scale, softcap: see `pallas_kernels.paged_attention.paged_attention`.
      implementation: see `pallas_kernels.paged_attention.paged_attention`.
      config: of that implementation.

    Returns:
      The output and its log-sum-exp, both float32, undefined (NaN too) in rows that no segment writes.

    Raises:
      ValueError: unknown implementation, or one that does not support the case.
    """
    options = {"outputs": outputs, "decode": decode, "scale": scale, "softcap": softcap, "config": config}
    operands = (query, position, cache, layer, block_table, segments)
    return _on_backend(operands, window, None, implementation, (query, query[..., 0]), options)


def attend_in_order(
    query: Float[Array, "rows heads head_dim"],
    position: Int[Array, " rows"],
    cache: PagedCache,
    layer: int | Int[Array, ""],
    block_table: Int[Array, "sequences pages_per_sequence"],
    segments: Segments,
    carry: Carry | None = None,
    *,
    outputs: int,
    decode: bool,
    window: int | Int[Array, ""] | None = None,
    scale: float,
    softcap: float | None = None,
    implementation: Implementation = "auto",
    config: Any = None,
) -> Carry:
    """`attend_segments` that adds keys to each row in their order, block by block, never split.

    A row's bits depend on its own query, tokens and position alone, also when its tokens come in several calls cut at
    multiples of `pallas_kernels.paged_attention.segments.ordered_block`.

    Args:
      carry: what to go on from; rows that no segment writes keep it. ``None``: nothing.

    Returns:
      The unfinished state, for `finish` with the same implementation.
    """
    carry = Carry.nothing(outputs, *query.shape[1:]) if carry is None else carry
    options = {"outputs": outputs, "decode": decode, "scale": scale, "softcap": softcap, "config": config}
    operands = (query, position, cache, layer, block_table, segments)
    heads = query[..., 0]
    return _on_backend(operands, window, carry, implementation, Carry(query, heads, heads), options)


def _on_backend(operands: tuple, window: Any, carry: Any, implementation: Any, out_like: Any, options: dict) -> Any:
    """``out_like`` is cut over heads as the query is, and so is the result."""
    query, position, cache, layer, *rest = operands
    backend = _backend(resolve(query, cache, options["decode"], implementation))
    static = window if isinstance(window, int) else None

    def run(query, position, cache, layer, block_table, segments, window, carry):
        window = window if static is None else static
        # In order, there is a carry from the beginning.
        extra = {"carry": carry, "ordered": carry is not None}
        return backend.attend(query, position, cache, layer, block_table, segments, window=window, **extra, **options)

    layer = jnp.asarray(layer, jnp.int32)
    traced = window if static is None else None
    return on_shards(run, (query, position, cache, layer, *rest, traced, carry), out_like)


def finish(carry: Carry, implementation: str) -> Result:
    """The output and its log-sum-exp, by the backend (a name that `resolve` gave) that made the carry."""
    return _backend(implementation).finish(carry)


def resolve(query: Any, cache: PagedCache, decode: bool, implementation: str) -> Implementation:
    """The backend that ``implementation`` means for this case; see `attend_segments` for errors."""
    if implementation == "auto":
        wanted = {name: _asks(name, query, cache, decode) for name in (platform(),) if name in _KERNELS}
        return cast(Implementation, choose("paged_attention", {**wanted, "xla": lambda: None}))
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}; choose auto, {', '.join(IMPLEMENTATIONS)}")
    if implementation in _KERNELS:
        reason = _asks(implementation, query, cache, decode)()
        if reason is not None:
            raise ValueError(f"implementation={implementation!r} does not support this case: {reason}")
    return cast(Implementation, implementation)


def _asks(name: str, query: Any, cache: PagedCache, decode: bool):
    return lambda: _backend(name).why_not(query, cache, decode=decode)


def _backend(name: str) -> Any:
    # One platform's backend never imports another's compiler.
    return importlib.import_module(f"pallas_kernels.paged_attention.{name}")
