"""Paged attention at real models' shapes, as serving compiles it for machines that need not be here."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.cases import Case
from pallas_kernels.paged_attention import PagedCache, paged_attention

_TPUS = ("v5e", "v5p", "v6e")
_GPUS = ("h200",)
# Query heads, key/value heads, head size.
SHAPES = {
    "llama3_8b": (32, 8, 128),
    "llama3_70b": (64, 8, 128),
    "qwen3_30b": (32, 4, 128),
    "qwen3_0.6b": (16, 8, 128),
    "gemma3_4b": (8, 4, 256),
}


def arguments(
    model: str,
    dtype: str,
    page_size: int,
    *,
    rows: int | None = None,
    batch: int = 64,
    tokens: int = 8192,
    layers: int = 2,
) -> tuple[Any, ...]:
    """Operands of `paged_attention`: a decode of ``batch`` sequences, or ``rows`` of them all."""
    heads, kv_heads, head_dim = SHAPES[model]
    shape, pages = jax.ShapeDtypeStruct, 2**18 // page_size
    keys: Any = shape((layers, pages, page_size, kv_heads, head_dim), jnp.dtype(dtype))
    scales: Any = shape((layers, pages, kv_heads, page_size), jnp.float32) if keys.dtype.itemsize == 1 else None
    starts = () if rows is None else (shape((batch + 1,), jnp.int32),)
    return (
        shape((batch if rows is None else rows, heads, head_dim), jnp.bfloat16),
        PagedCache(keys, keys, scales, scales),
        shape((), jnp.int32),
        shape((batch, tokens // page_size), jnp.int32),
        shape((batch,), jnp.int32),
        *starts,
    )


def cases() -> Iterator[Case]:
    """Decoding, ragged rows and the fixed order."""
    for model in SHAPES:
        yield Case(f"paged_attention/decode/{model}", paged_attention, arguments(model, "bfloat16", 64), _TPUS)
    for dtype, page_size in (("bfloat16", 16), ("int8", 128), ("float8_e4m3fn", 128)):
        name = f"paged_attention/decode/llama3_8b/{dtype}/pages of {page_size}"
        yield Case(name, paged_attention, arguments("llama3_8b", dtype, page_size), _TPUS)
    ragged = arguments("llama3_8b", "bfloat16", 64, rows=2048)
    yield Case("paged_attention/ragged/llama3_8b", paged_attention, ragged, _TPUS)
    invariant = functools.partial(paged_attention, invariant=True)
    yield Case("paged_attention/invariant/llama3_8b", invariant, ragged, _TPUS)
    yield from _gpu_cases()


def _gpu_cases() -> Iterator[Case]:
    """A compilation for a GPU takes a second, so there are more of them."""

    def case(kind: str, model: str, page_size: int, dtype: str, batch: int, rows: int | None, **options: Any) -> Case:
        name = f"paged_attention/{kind}/{model}/page{page_size}/{dtype}"
        shapes = arguments(model, dtype, page_size, rows=rows, batch=batch, layers=4)
        return Case(name, functools.partial(paged_attention, **options), shapes, _GPUS)

    for page_size in (16, 64, 128):
        for dtype in ("bfloat16", "int8", "float8_e4m3fn"):
            yield case("decode", "llama3_8b", page_size, dtype, 256, None)
            if page_size == 64:
                for model in SHAPES:
                    yield case("ragged", model, page_size, dtype, 64, 4096)
                    if model != "llama3_8b":
                        yield case("decode", model, page_size, dtype, 64, None)
    yield case("ragged", "llama3_8b", 16, "bfloat16", 64, 4096, window=1024, softcap=50.0)
    yield case("invariant", "llama3_8b", 64, "bfloat16", 64, 4096, invariant=True)
