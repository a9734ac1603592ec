"""Sizes of tiles of the TPU kernels, and whether they fit a chip's vector memory (VMEM)."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from pallas_kernels.chips import ALIASES, chip_of
from pallas_kernels.flash_attention import tpu_tiles as tiles
from pallas_kernels.platform import chip
from pallas_kernels.tuning import tuned_config

LANES = 128
# Chips that are not known (a CPU that interprets) are taken for the smallest in use.
_VMEM = 64 * 2**20
# What a kernel may ask for; the rest is the compiler's.
_SHARE = 0.9


@dataclasses.dataclass(frozen=True)
class TpuConfig:
    """Sizes in queries and keys, each a multiple of 128; shorter sequences are cut into smaller tiles.

    Attributes:
      block_q, block_kv: a tile, what a step of the grid holds in VMEM.
      rows, columns: of the scores that are multiplied at a time. Rows stream through the matrix units, columns are held
        there; rows are queries in the forward pass and in the kernel of the query's gradient alone, else keys.
      block_q_backward, block_kv_backward, rows_backward, columns_backward: of the backward pass.
      fused_backward: all gradients from one kernel (5 products per tile), which keeps the sums of a head's keys in
        VMEM; where those do not fit, and if this is false, there are two kernels (7 products).
    """

    block_q: int = 1024
    block_kv: int = 1024
    rows: int = 1024
    columns: int = 512
    block_q_backward: int = 1024
    block_kv_backward: int = 1024
    rows_backward: int = 1024
    columns_backward: int = 512
    fused_backward: bool = True

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            if field.name != "fused_backward" and (size <= 0 or size % LANES):
                raise ValueError(f"{field.name}={size}; it must be a positive multiple of {LANES}")


def heuristic(chip: str | None, dtype: Any, head_dim: int) -> TpuConfig:
    """What the static schedules favour."""
    chip = ALIASES.get(chip, chip) if chip else chip
    if jnp.dtype(dtype).itemsize == 4:
        # A product is six of the unit's own: smaller tiles keep the program in bounds.
        return TpuConfig(512, 512, 512, 512, 512, 512, 512, 512)
    if chip in ("TPU v5 lite", "TPU v5") and head_dim <= LANES:
        # Small matrix units: few queries at a time against many keys keep the scores near the registers.
        return TpuConfig(rows=256, columns=1024, rows_backward=512)
    return TpuConfig()


def chosen(query: Any, key: Any) -> TpuConfig:
    """The tuning table's configuration, else the heuristic's."""
    _, queries, heads, head_dim = query.shape
    keys, kv_heads = key.shape[1:3]
    shape = {"queries": queries, "keys": keys, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    config = tuned_config(TpuConfig, "flash_attention", chip(), query.dtype, **shape)
    return heuristic(chip(), query.dtype, head_dim) if config is None else config


def vmem_limit() -> int:
    """Bytes that a kernel may take."""
    known = chip_of(chip())
    return int(_SHARE * (known.vmem_bytes if known and known.vmem_bytes else _VMEM))


def blocks(config: TpuConfig, queries: int, keys: int, backward: bool = False) -> tuple[int, int]:
    """The tile of this many queries and keys."""
    if backward:
        return tiles.fit(queries, config.block_q_backward), tiles.fit(keys, config.block_kv_backward)
    return tiles.fit(queries, config.block_q), tiles.fit(keys, config.block_kv)


def forward_vmem(config: TpuConfig, query: Any, key: Any) -> int:
    """Bytes of VMEM that the forward kernel takes, about."""
    block_q, block_kv = blocks(config, query.shape[1], key.shape[1])
    width, size = _lanes(query.shape[-1]), jnp.dtype(query.dtype).itemsize
    operands = 2 * width * size * (2 * block_q + 2 * block_kv)  # twice: one is fetched while the other is used
    scratch = 4 * block_q * (width + 4 * LANES)
    return operands + scratch + _scores(block_q, config.rows, block_kv, config.columns, 2, size)


def backward_vmem(config: TpuConfig, query: Any, key: Any, fused: bool) -> int:
    """Bytes of VMEM that the backward kernel, or the larger of two, takes, about."""
    block_q, block_kv = blocks(config, query.shape[1], key.shape[1], backward=True)
    width, size = _lanes(query.shape[-1]), jnp.dtype(query.dtype).itemsize
    group = query.shape[2] // key.shape[2]
    keys = -(-key.shape[1] // block_kv) * block_kv
    operands = 2 * width * size * (2 * block_q + 2 * block_kv)
    scores = _scores(block_q, config.columns_backward, block_kv, config.rows_backward, 4, size)
    if fused:
        return operands + scores + (group * block_q + 2 * keys) * width * (4 + 2 * size)
    to_queries = block_q * (width * (4 + 2 * size) + 16 * LANES)
    to_keys = 2 * block_kv * width * (4 + 2 * size)
    return operands + scores + max(to_queries, to_keys)


def does_not_fit(config: TpuConfig, query: Any, key: Any) -> str | None:
    """Which kernel's tiles are too large for the chip; ``None``: none."""
    needs = {
        "block_q, block_kv": forward_vmem(config, query, key),
        "block_q_backward, block_kv_backward": backward_vmem(config, query, key, fused=False),
    }
    for names, need in needs.items():
        if need > vmem_limit():
            return f"config: {names} take {need / 2**20:.0f} MiB of VMEM; {chip()} gives {vmem_limit() / 2**20:.0f} MiB"
    return None


def fuses(config: TpuConfig, query: Any, key: Any) -> bool:
    """Whether all gradients come from one kernel."""
    return config.fused_backward and backward_vmem(config, query, key, fused=True) <= vmem_limit()


def _scores(block_q: int, rows: int, block_kv: int, columns: int, arrays: int, size: int) -> int:
    """Scores and what is computed from them, in float32 and in the operands' type."""
    return min(block_q, rows) * min(block_kv, columns) * arrays * (4 + size)


def _lanes(width: int) -> int:
    return -(-width // LANES) * LANES
