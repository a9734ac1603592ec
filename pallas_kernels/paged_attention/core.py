"""Chooses the backend of the core and gives each device its own heads."""

import importlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.fallback import choose
from pallas_kernels.paged_attention.cache import PagedCache
from pallas_kernels.paged_attention.segments import Carry, Segments
from pallas_kernels.platform import platform
from pallas_kernels.sharded import on_shards

Implementation = Literal["auto", "xla", "gpu", "tpu", "reference"]
IMPLEMENTATIONS = ("xla", "gpu", "tpu", "reference")


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
    carry: Carry | None = None,
    ordered: bool = False,
    implementation: Implementation = "auto",
    config: Any = None,
) -> tuple[Float[Array, "outputs heads head_dim"], Float[Array, "outputs heads"]] | Carry:
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
      carry: with ``ordered``: go on from here; rows that no segment writes keep it.
      ordered: add keys to each row in their order, block by block, never split, and return the unfinished state.
      implementation: see `pallas_kernels.paged_attention.paged_attention`.
      config: of that implementation.

    Returns:
      The output and its log-sum-exp, both float32, undefined (NaN too) in rows that no segment writes; with ``ordered``
      a `Carry`, for the ``finish`` of the same backend (`finish`).

    Raises:
      ValueError: unknown implementation, or one that does not support the case.
    """
    name = resolve(query, cache, decode, implementation)
    backend = _backend(name)
    layer = jnp.asarray(layer, jnp.int32)
    options = {"outputs": outputs, "decode": decode, "scale": scale, "softcap": softcap, "ordered": ordered}
    if ordered and carry is None:
        carry = Carry.nothing(outputs, *query.shape[1:])

    def run(query, position, cache, layer, block_table, segments, window, carry):
        return backend.attend(
            query, position, cache, layer, block_table, segments, window=window, carry=carry, config=config, **options
        )

    whole, heads = query, query[..., 0]  # cut as the query is, over heads
    out_like = Carry(whole, heads, heads) if ordered else (whole, heads)
    static = window is None or isinstance(window, int)
    operands = (query, position, cache, layer, block_table, segments, None if static else window, carry)
    if static:
        return on_shards(lambda *xs: run(*xs[:6], window, xs[7]), operands, out_like)
    return on_shards(run, operands, out_like)


def finish(
    carry: Carry, implementation: str
) -> tuple[Float[Array, "outputs heads head_dim"], Float[Array, "outputs heads"]]:
    """The output and its log-sum-exp, of the backend (a name that `resolve` gave) that made the carry."""
    return _backend(implementation).finish(carry)


def resolve(query: Any, cache: PagedCache, decode: bool, implementation: Implementation) -> str:
    """The backend that ``implementation`` means for this case; see `attend_segments` for errors."""
    if implementation == "auto":
        wanted = {name: _asks(name, query, cache, decode) for name in (platform(),) if name in ("gpu", "tpu")}
        return choose("paged_attention", {**wanted, "xla": lambda: None})
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}; choose auto, {', '.join(IMPLEMENTATIONS)}")
    if implementation in ("gpu", "tpu"):
        reason = _asks(implementation, query, cache, decode)()
        if reason is not None:
            raise ValueError(f"implementation={implementation!r} does not support this case: {reason}")
    return implementation


def _asks(name: str, query: Any, cache: PagedCache, decode: bool):
    return lambda: _backend(name).why_not(query, cache, decode=decode)


def _backend(name: str) -> Any:
    # One platform's backend never imports another's compiler.
    return importlib.import_module(f"pallas_kernels.paged_attention.{name}")
