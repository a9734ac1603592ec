"""Paged attention at real models' shapes, to be compiled for absent machines."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.cases import Case
from pallas_kernels.paged_attention import PagedCache, paged_attention

# Heads, kv heads, size of a head.
MODELS = {
    "llama3_8b": (32, 8, 128),
    "llama3_70b": (64, 8, 128),
    "qwen3_30b": (32, 4, 128),
    "qwen3_0.6b": (16, 8, 128),
    "gemma3_4b": (8, 4, 256),
}
_LAYERS, _TOKENS, _LONGEST = 4, 2**18, 8192


def _case(kind: str, model: str, page_size: int, kept: str, rows: int, sequences: int, **options: Any) -> Case:
    heads, kv_heads, head_dim = MODELS[model]
    shape: Any = jax.ShapeDtypeStruct
    pages = _TOKENS // page_size
    held = shape((_LAYERS, pages, page_size, kv_heads, head_dim), jnp.dtype(kept))
    scales = None if kept == "bfloat16" else shape((_LAYERS, pages, kv_heads, page_size), jnp.float32)
    arguments: tuple[Any, ...] = (
        shape((rows, heads, head_dim), jnp.bfloat16),
        PagedCache(held, held, scales, scales),
        shape((), jnp.int32),
        shape((sequences, _LONGEST // page_size), jnp.int32),
        shape((sequences,), jnp.int32),
    )
    if kind != "decode":
        arguments += (shape((sequences + 1,), jnp.int32),)
    name = f"paged_attention/{kind}/{model}/page{page_size}/{kept}"
    return Case(name, functools.partial(paged_attention, **options), arguments, ("h200",))


def cases() -> Iterator[Case]:
    """Decoding of 64 to 256 sequences, and ragged batches of 4096 tokens."""
    for page_size in (16, 64, 128):
        for kept in ("bfloat16", "int8", "float8_e4m3fn"):
            yield _case("decode", "llama3_8b", page_size, kept, 256, 256)
            if page_size == 64:
                for model in MODELS:
                    yield _case("ragged", model, page_size, kept, 4096, 64)
                    if model != "llama3_8b":
                        yield _case("decode", model, page_size, kept, 64, 64)
    yield _case("ragged", "llama3_8b", 16, "bfloat16", 4096, 64, window=1024, softcap=50.0)
    yield _case("invariant", "llama3_8b", 64, "bfloat16", 4096, 64, invariant=True)
