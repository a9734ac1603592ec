"""Attention on CPUs: a kernel in C++, whose source `cpu_kernel.cc` is compiled for the machine on first use."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.native import LANES, register
from pallas_kernels.platform import platform

_SOURCE = pathlib.Path(__file__).with_name("cpu_kernel.cc")
_TYPES = ("float32", "bfloat16")


def why_not(query: Any, key: Any, value: Any, *, softcap: float | None, config: Any) -> str | None:
    """See `pallas_kernels.flash_attention.backend.Backend`."""
    if config is not None:
        return f"config={config!r}; nothing of it can be configured"
    if platform() != "cpu":
        return f"the program is for {platform()}"
    if query.shape[-1] % LANES:
        return f"query has head_dim {query.shape[-1]}, which is not a multiple of {LANES}"
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dtype.name not in _TYPES:
            return f"{name} has dtype {x.dtype.name}; it takes {' and '.join(_TYPES)}"
    if key.dtype != value.dtype:
        return f"key has dtype {key.dtype.name} and value {value.dtype.name}; they must be the same"
    return register(_SOURCE, "flash_attention").missing


def forward(query, key, value, intervals, *, scale, softcap, out_dtype=None, config=None):
    """See `pallas_kernels.flash_attention.backend.Backend.forward`."""
    del config
    out_dtype = out_dtype or query.dtype
    if not query.size or not key.size:
        return jnp.zeros_like(query, out_dtype), jnp.full_like(query[..., 0], -jnp.inf, jnp.float32)
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (query.shape, query.shape[:-1])]
    out, lse = _call("flash_attention", results)(
        *_operands(query, key, value, intervals, scale), softcap=_number(softcap)
    )
    return out.astype(out_dtype), lse


def backward(query, key, value, lse, delta, out_gradient, intervals, *, scale, softcap, out_dtype=None, config=None):
    """See `pallas_kernels.flash_attention.backend.Backend.backward`."""
    del config
    dtypes = [out_dtype or x.dtype for x in (query, key, value)]
    if not query.size or not key.size:
        return tuple(jnp.zeros_like(x, dtype) for x, dtype in zip((query, key, value), dtypes, strict=True))
    group = query.shape[2] // key.shape[2]
    per_head = (*key.shape[:2], query.shape[2], key.shape[3])
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (query.shape, per_head, per_head)]
    dq, dk, dv = _call("flash_attention_backward", results)(
        *_operands(query, key, value, intervals, scale),
        lse,
        delta,
        out_gradient.astype(jnp.float32),
        softcap=_number(softcap),
    )
    if group > 1:
        dk, dv = (x.reshape(*key.shape[:3], group, key.shape[3]).sum(axis=3) for x in (dk, dv))
    dq, dk, dv = (x.astype(dtype) for x, dtype in zip((dq * scale, dk, dv), dtypes, strict=True))
    return dq, dk, dv


def _operands(query, key, value, intervals, scale):
    intervals = jnp.broadcast_to(intervals, (query.shape[0], *intervals.shape[1:]))
    return query.astype(jnp.float32) * scale, key, value, intervals.astype(jnp.int32)


def _number(softcap: float | None) -> np.float32:
    return np.float32(0.0 if softcap is None else softcap)


def _call(symbol: str, results: Any) -> Any:
    # More axes before the others are more of a batch.
    return jax.ffi.ffi_call(register(_SOURCE, symbol).target, results, vmap_method="broadcast_all")
