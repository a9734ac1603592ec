"""What is compiled for absent machines: attention and its gradients at real models' shapes, causal, 8192 tokens."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.cases import Case
from pallas_kernels.flash_attention import Implementation, flash_attention

# Heads, key heads, head size, and what else the model asks for.
MODELS: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "llama3_8b": (32, 8, 128, {}),
    "llama3_70b": (64, 8, 128, {}),
    "qwen3_1b": (16, 8, 128, {}),
    "gemma2_2b": (8, 4, 256, {"window": 4096, "softcap": 50.0}),
}
LENGTH = 8192
_TPUS = ("v5e", "v5p", "v6e")


def gradients(implementation: Implementation, **options: Any) -> Callable[..., Any]:
    """Of query, key, value and the output's gradient: the output and the three gradients."""

    def function(query, key, value, out_gradient):
        def attend(query, key, value):
            return flash_attention(query, key, value, implementation=implementation, **options)

        out, vjp = jax.vjp(attend, query, key, value)
        return out, vjp(out_gradient)

    return function


def operands(heads: int, kv_heads: int, head_dim: int, length: int = LENGTH, dtype: Any = jnp.bfloat16) -> tuple:
    """Shapes for `gradients`."""
    query, key = (jax.ShapeDtypeStruct((1, length, n, head_dim), dtype) for n in (heads, kv_heads))
    return query, key, key, query


def cases() -> Iterator[Case]:
    """See `pallas_kernels.cases`."""
    for model, (heads, kv_heads, head_dim, options) in MODELS.items():
        shapes = operands(heads, kv_heads, head_dim)
        yield Case(f"flash_attention/tpu/{model}", gradients("tpu", **options), shapes, _TPUS)
        yield Case(f"flash_attention/splash/{model}", gradients("splash", **options), shapes, _TPUS)
