"""The core on CPUs: a kernel in C++, whose source `cpu_kernel.cc` is compiled for the machine on first use."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.native import register
from pallas_kernels.paged_attention import xla
from pallas_kernels.paged_attention.cache import PagedCache
from pallas_kernels.paged_attention.segments import Segments
from pallas_kernels.platform import platform

_SOURCE = pathlib.Path(__file__).with_name("cpu_kernel.cc")
_TYPES = ("float32", "bfloat16", "int8", "float8_e4m3fn")
# Numbers that all CPUs' vector registers hold a multiple of.
_LANES = 16
_NO_WINDOW = 2**31 - 1


def why_not(query: Any, cache: PagedCache, *, decode: bool) -> str | None:
    """Why the case is not supported, or ``None``."""
    del decode
    if platform() != "cpu":
        return f"the program is for {platform()}"
    if query.shape[-1] % _LANES:
        return f"head_dim {query.shape[-1]} is not a multiple of {_LANES}"
    if cache.key.dtype.name not in _TYPES:
        return f"a cache of {cache.key.dtype.name}; it reads {', '.join(_TYPES)}"
    return _kernel().missing


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
    config: xla.XlaConfig | None = None,
):
    """See `pallas_kernels.paged_attention.segments`; an ordered computation, and so a ``config``, is that of `xla`."""
    if ordered:
        options: dict[str, Any] = {"outputs": outputs, "decode": decode, "window": window, "scale": scale}
        options |= {"softcap": softcap, "carry": carry, "ordered": ordered, "config": config}
        return xla.attend(query, position, cache, layer, block_table, segments, **options)
    heads, head_dim = query.shape[1:]
    result = (
        jax.ShapeDtypeStruct((outputs, heads, head_dim), jnp.float32),
        jax.ShapeDtypeStruct((outputs, heads), jnp.float32),
    )
    fields = [getattr(segments, field.name).astype(jnp.int32) for field in dataclasses.fields(Segments)]
    call = jax.ffi.ffi_call(_kernel().target, result, vmap_method="sequential")
    return call(
        query.astype(jnp.float32) * scale,
        position.astype(jnp.int32),
        cache.key,
        cache.value,
        jnp.asarray(layer, jnp.int32),
        block_table,
        jnp.stack(fields),
        jnp.asarray(_NO_WINDOW if window is None else window, jnp.int32),
        *([] if cache.key_scale is None else [cache.key_scale, cache.value_scale]),
        softcap=np.float32(0.0 if softcap is None else softcap),
    )


finish = xla.finish


def _kernel():
    return register(_SOURCE, "paged_attention")
