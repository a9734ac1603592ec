"""The core on CPUs: a kernel in C++, whose source `cpu_kernel.cc` is compiled for the machine on first use."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.native import LANES, register
from pallas_kernels.paged_attention import xla
from pallas_kernels.paged_attention.cache import PagedCache
from pallas_kernels.paged_attention.segments import Carry, Segments, ordered_block
from pallas_kernels.platform import platform

_SOURCE = pathlib.Path(__file__).with_name("cpu_kernel.cc")
_TYPES = ("float32", "bfloat16", "int8", "float8_e4m3fn")
_NO_WINDOW = 2**31 - 1


def why_not(query: Any, cache: PagedCache, *, decode: bool) -> str | None:
    """Why the case is not supported, or ``None``."""
    del decode
    if platform() != "cpu":
        return f"the program is for {platform()}"
    if query.shape[-1] % LANES:
        return f"head_dim {query.shape[-1]} is not a multiple of {LANES}"
    if cache.key.dtype.name not in _TYPES:
        return f"a cache of {cache.key.dtype.name}; it reads {', '.join(_TYPES)}"
    return register(_SOURCE, "paged_attention").missing


def attend(
    query,
    position,
    cache: PagedCache,
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
    """See `pallas_kernels.paged_attention.segments`. Nothing can be configured."""
    del decode, config
    heads, head_dim = query.shape[1:]
    operands = [
        query.astype(jnp.float32) * scale,
        position.astype(jnp.int32),
        cache.key,
        cache.value,
        jnp.asarray(layer, jnp.int32),
        block_table,
        jnp.stack([getattr(segments, field.name).astype(jnp.int32) for field in dataclasses.fields(Segments)]),
        jnp.asarray(_NO_WINDOW if window is None else window, jnp.int32),
    ]
    scales = [] if cache.key_scale is None else [cache.key_scale, cache.value_scale]
    options: dict[str, Any] = {"softcap": np.float32(0.0 if softcap is None else softcap)}
    numbers = jax.ShapeDtypeStruct((outputs, heads), jnp.float32)
    vectors = jax.ShapeDtypeStruct((outputs, heads, head_dim), jnp.float32)
    if not ordered:
        return _call("paged_attention", (vectors, numbers))(*operands, *scales, **options)
    carry = Carry.nothing(outputs, heads, head_dim) if carry is None else carry
    aliases = {len(operands) + i: i for i in range(3)}
    call = _call("paged_attention_ordered", (vectors, numbers, numbers), input_output_aliases=aliases)
    options["cut"] = np.int64(ordered_block(cache.page_size))
    return Carry(*call(*operands, carry.total, carry.weight, carry.peak, *scales, **options))


def _call(symbol: str, result: Any, **options: Any) -> Any:
    return jax.ffi.ffi_call(register(_SOURCE, symbol).target, result, vmap_method="sequential", **options)


finish = xla.finish
