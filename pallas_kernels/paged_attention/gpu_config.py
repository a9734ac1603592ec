"""How the work of the Mosaic GPU core is cut, and what of it fits in shared memory."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from pallas_kernels.paged_attention.cache import QUANTIZED, PagedCache
from pallas_kernels.paged_attention.segments import ordered_block
from pallas_kernels.platform import chip, platform

ROWS = 64  # of a warpgroup's tile: wgmma's M
SMEM_BYTES = 232_448  # that one block may have on Hopper
_ALIGN = 1024  # Mosaic starts every buffer at a multiple
_HOPPERS = ("H100", "H200", "GH200")
_BLOCKS = (64, 128, 256)


@dataclasses.dataclass(frozen=True)
class GpuConfig:
    """How the work of one call is cut.

    Attributes:
      block: tokens of a stage of segments of few rows. Each warpgroup takes an equal part of them, at least 64.
      stages: blocks of keys, and as many of values, on their way at a time.
      warpgroups: that compute, 1 or 2, beside one that loads.
      wide_block: tokens of a stage of segments of many rows, and of all segments in ordered calls. All warpgroups take
        all of them, each for 64 rows of its own.
      wide_stages, wide_warpgroups: likewise.
      workers: blocks of the launch, which stay for the whole call: as many as the chip holds at a time.
      least: blocks of work that are worth a worker of their own.
    """

    block: int = 128
    stages: int = 2
    warpgroups: int = 2
    wide_block: int = 128
    wide_stages: int = 2
    wide_warpgroups: int = 2
    workers: int = 132
    least: int = 4

    def __post_init__(self):
        for name in ("", "wide_"):
            block, stages, warpgroups = self.shape(wide=bool(name))
            if warpgroups not in (1, 2):
                raise ValueError(f"GpuConfig.{name}warpgroups={warpgroups}; allowed are 1 and 2")
            if block not in _BLOCKS:
                raise ValueError(f"GpuConfig.{name}block={block}; allowed are {_BLOCKS}")
            if stages < 2:
                raise ValueError(f"GpuConfig.{name}stages={stages}; must be at least 2")
        if self.block // self.warpgroups < 64:
            raise ValueError(
                f"GpuConfig.block={self.block}; must give each of {self.warpgroups} warpgroups 64 tokens or more"
            )
        for name in ("workers", "least"):
            if getattr(self, name) < 1:
                raise ValueError(f"GpuConfig.{name}={getattr(self, name)}; must be at least 1")

    def shape(self, *, wide: bool) -> tuple[int, int, int]:
        """Block, stages and warpgroups of a launch."""
        if wide:
            return self.wide_block, self.wide_stages, self.wide_warpgroups
        return self.block, self.stages, self.warpgroups

    def check(self, cache: PagedCache, *, ordered: bool) -> None:
        """Raises a `ValueError` where this cannot serve such a cache."""
        page_size, _, head_dim = cache.key.shape[2:]
        for name in ("", "wide_"):
            block, stages, warpgroups = self.shape(wide=bool(name))
            part = block if name else block // warpgroups
            if part % page_size and page_size % part:
                raise ValueError(
                    f"GpuConfig.{name}block={block} gives a warpgroup {part} tokens, which neither divides nor is a "
                    f"multiple of page_size={page_size}"
                )
            size = smem_bytes(block, stages, warpgroups, head_dim, cache.quantized, wide=bool(name))
            if size > SMEM_BYTES:
                raise ValueError(
                    f"GpuConfig.{name}block={block}, {name}stages={stages} takes {size} bytes of shared memory at "
                    f"head_dim={head_dim}; {SMEM_BYTES} are there"
                )
        if ordered and ordered_block(page_size) % self.wide_block:
            raise ValueError(
                f"GpuConfig.wide_block={self.wide_block} must divide {ordered_block(page_size)}, the tokens between "
                f"places where ordered attention may be cut at page_size={page_size}"
            )


def smem_bytes(block: int, stages: int, warpgroups: int, head_dim: int, quantized: bool, *, wide: bool) -> int:
    """Shared memory of one block of a launch, from above."""
    part = block if wide else block // warpgroups
    width = 1 if quantized else 2
    buffers = [
        (warpgroups if wide else 2) * ROWS * head_dim * 2,  # queries
        *[stages * block * head_dim * width] * 2,  # keys, values
        warpgroups * ROWS * part * 2,  # probabilities
    ]
    if not wide:
        buffers.append(warpgroups * ROWS * min(head_dim, 64) * 4)  # output on its way out
    buffers.append(warpgroups * ROWS * 4)  # its log-sum-exp
    if quantized:
        buffers += [*[block * head_dim * 2] * 2, *[stages * block * 4] * 2]  # widened keys and values; scales
    return sum(-(-x // _ALIGN) * _ALIGN for x in buffers) + 3 * _ALIGN  # scratch of reductions, barriers


def heuristic(head_dim: int, page_size: int, quantized: bool, *, workers: int = 132) -> GpuConfig:
    """The largest blocks, and then the most stages, that fit."""

    def fit(wide: bool) -> tuple[int, int, int]:
        # Logits of 128 tokens leave too few registers for a head of more than 128, and for the scales of many tokens.
        small = head_dim > 128 or (wide and quantized)
        for block in (64,) if small else (128, 64):
            warpgroups = 2 if wide or block > 64 else 1
            for stages in (4, 3, 2):
                if smem_bytes(block, stages, warpgroups, head_dim, quantized, wide=wide) <= SMEM_BYTES:
                    return block, stages, warpgroups
        raise ValueError(f"no block fits in shared memory at head_dim={head_dim}, page_size={page_size}")

    return GpuConfig(*fit(False), *fit(True), workers=workers)


def why_not(query: Any, cache: PagedCache, *, decode: bool) -> str | None:
    """Why this case cannot be done here, or ``None``."""
    del decode
    page_size, kv_heads, head_dim = cache.key.shape[2:]
    if platform() == "gpu" and not any(name in (chip() or "") for name in _HOPPERS):
        return f"the chip is {chip()}; the kernel is for {', '.join(_HOPPERS)}"
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"query has dtype {query.dtype.name}; the kernel takes bfloat16 and float16"
    if cache.key.dtype != query.dtype and cache.key.dtype.name not in QUANTIZED:
        allowed = ", ".join((query.dtype.name, *QUANTIZED))
        return f"cache.key has dtype {cache.key.dtype.name}; the kernel takes {allowed} with a {query.dtype.name} query"
    if head_dim % 64 or head_dim > 256:
        return f"query has head_dim {head_dim}; the kernel takes 64, 128, 192 and 256"
    if page_size not in (16, 32, 64, 128):
        return f"cache has page_size {page_size}; the kernel takes 16, 32, 64 and 128"
    if query.shape[1] // kv_heads > ROWS:
        return f"query has {query.shape[1] // kv_heads} heads per kv head; the kernel takes {ROWS} at most"
    return None
