"""Attention on TPUs, in Pallas; see `pallas_kernels.flash_attention.backend.Backend` for what it supplies.

Elsewhere the same kernels run in Pallas's interpreter, slowly.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.flash_attention import tpu_backward, tpu_forward, tpu_tiles
from pallas_kernels.flash_attention.tpu_config import TpuConfig, blocks, chosen, does_not_fit, heuristic

MAX_HEAD_DIM = 256


def why_not(query: Any, key: Any, value: Any, *, softcap: float | None, config: TpuConfig | None) -> str | None:
    """See `Backend.why_not`."""
    del softcap
    if config is not None and not isinstance(config, TpuConfig):
        return f"config={config!r}; the TPU kernels take a TpuConfig"
    if query.dtype not in (jnp.bfloat16, jnp.float32) or not query.dtype == key.dtype == value.dtype:
        types = ", ".join(jnp.dtype(x.dtype).name for x in (query, key, value))
        return f"query, key and value have dtypes {types}; they must all be bfloat16 or all float32"
    if query.shape[-1] > MAX_HEAD_DIM or query.shape[-1] % 8:
        return f"query has head_dim={query.shape[-1]}; it must be a multiple of 8, at most {MAX_HEAD_DIM}"
    if 0 in query.shape or 0 in key.shape:
        return f"query {query.shape} or key {key.shape} is empty"
    config = chosen(query, key) if config is None else config
    if _steps(config, query, key) > tpu_tiles.MAX_STEPS:
        return f"config: {query.shape[1]} queries and {key.shape[1]} keys are too many tiles; larger blocks are fewer"
    return does_not_fit(config, query, key)


def forward(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads head_dim"],
    intervals: Int[Array, "1|batch queries 2"],
    *,
    scale: float,
    softcap: float | None,
    out_dtype: DTypeLike | None = None,
    config: TpuConfig | None = None,
) -> tuple[Float[Array, "batch queries heads head_dim"], Float[Array, "batch queries heads"]]:
    """See `Backend.forward`.

    Raises:
      ValueError: what `why_not` says.
    """
    config = _checked(query, key, value, softcap, config)
    dtype = query.dtype if out_dtype is None else out_dtype

    def run(query, key, value, intervals):
        return tpu_forward.forward(
            query, key, value, intervals, scale=scale, softcap=softcap, dtype=dtype, config=config
        )

    return _in_parts(run, _steps(config, query, key), (query, key, value), intervals)


def backward(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads head_dim"],
    lse: Float[Array, "batch queries heads"],
    delta: Float[Array, "batch queries heads"],
    out_gradient: Float[Array, "batch queries heads head_dim"],
    intervals: Int[Array, "1|batch queries 2"],
    *,
    scale: float,
    softcap: float | None,
    out_dtype: DTypeLike | None = None,
    config: TpuConfig | None = None,
) -> tuple[
    Float[Array, "batch queries heads head_dim"],
    Float[Array, "batch keys kv_heads head_dim"],
    Float[Array, "batch keys kv_heads head_dim"],
]:
    """See `Backend.backward`.

    Raises:
      ValueError: what `why_not` says.
    """
    config = _checked(query, key, value, softcap, config)
    dtypes = [x.dtype if out_dtype is None else out_dtype for x in (query, key, value)]

    def run(query, key, value, lse, delta, out_gradient, intervals):
        operands = (query, key, value, lse, delta, out_gradient, intervals)
        return tpu_backward.backward(*operands, scale=scale, softcap=softcap, dtypes=dtypes, config=config)

    operands = (query, key, value, lse, delta, out_gradient)
    return _in_parts(run, _steps(config, query, key), operands, intervals)


def _checked(query: Any, key: Any, value: Any, softcap: float | None, config: TpuConfig | None) -> TpuConfig:
    if (reason := why_not(query, key, value, softcap=softcap, config=config)) is not None:
        raise ValueError(reason)
    return chosen(query, key) if config is None else config


def _steps(config: TpuConfig, query: Any, key: Any) -> int:
    """Most steps that one entry of the batch can take in any of the kernels."""
    lengths = query.shape[1], key.shape[1]
    tiles = (blocks(config, *lengths, backward=backward) for backward in (False, True))
    return max(-(-lengths[0] // block_q) * -(-lengths[1] // block_kv) for block_q, block_kv in tiles)


def _in_parts(run: Callable[..., Any], steps: int, operands: tuple[jax.Array, ...], intervals: jax.Array) -> Any:
    """Runs on as many entries of the batch at a time as scalar memory holds the steps of."""
    batch, size = intervals.shape[0], max(1, tpu_tiles.MAX_STEPS // steps)
    if batch <= size:
        return run(*operands, intervals)
    parts = [run(*(x[i : i + size] for x in (*operands, intervals))) for i in range(0, batch, size)]
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)


__all__ = ["TpuConfig", "backward", "forward", "heuristic", "why_not"]
