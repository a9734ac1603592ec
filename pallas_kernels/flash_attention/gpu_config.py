"""Tiles of the GPU kernels, what they cost in shared memory and registers, and which cases the kernels take."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.chips import CHIPS
from pallas_kernels.platform import chip, platform
from pallas_kernels.tuning import tuned_config

# A matmul of a warpgroup has 64 rows, and rows of 64 elements of 16 bits fill the 128 bytes of a swizzle.
ROWS = 64
COLUMNS = 64
# Shared memory that a block of an H100 or H200 may ask for, less what barriers and the alignment of buffers take.
SMEM_BYTES = CHIPS["NVIDIA H200"].smem_bytes - 1_024
# Registers of a thread, 64 k to a block, by the number of computing warpgroups beside the one that copies: what a
# computing thread may take once the copying ones have given theirs back, and what these keep.
REGISTERS = {1: (255, 255), 2: (240, 24), 3: (160, 24)}
# Indices, addresses, row statistics and values under way, beside the tiles.
_OTHER_REGISTERS = 48


@dataclasses.dataclass(frozen=True)
class GpuConfig:
    """Tiles and schedule of the kernels; all sizes are in tokens and whole 64s.

    Attributes:
      block_q: queries of a computing warpgroup, forward.
      block_kv: keys of a step, forward.
      stages: steps whose keys and values are in shared memory at a time, forward.
      warpgroups: computing warpgroups of a block, forward; one more copies.
      take_turns: warpgroups of the forward pass take turns at the tensor cores, so that one's softmax runs beside the
        other's matmuls.
      registers: probabilities go to the second matmul in registers, not through shared memory. Off, since ptxas before
        13.3 may corrupt such a matmul.
      dq_block_kv, dq_stages, dq_warpgroups: likewise, for the gradient of queries.
      dkv_block_q, dkv_stages: queries of a step and steps in shared memory, for the gradients of keys and values.
    """

    block_q: int = 64
    block_kv: int = 128
    stages: int = 2
    warpgroups: int = 2
    take_turns: bool = True
    registers: bool = False
    dq_block_kv: int = 64
    dq_stages: int = 2
    dq_warpgroups: int = 2
    dkv_block_q: int = 64
    dkv_stages: int = 2

    def smem_bytes(self, head_dim: int) -> dict[str, int]:
        """Shared memory of each kernel at a (padded) head size, in bytes."""
        groups, q = self.warpgroups, self.block_q
        forward = 2 * head_dim * (groups * q + 2 * self.stages * self.block_kv) + groups * q * 12
        forward += 0 if self.registers else 2 * groups * q * self.block_kv
        dq = 2 * head_dim * 2 * (self.dq_warpgroups * ROWS + self.dq_stages * self.dq_block_kv)
        dq += self.dq_warpgroups * ROWS * (2 * self.dq_block_kv + 16)
        split = splits_columns(head_dim)
        columns = 256 if split else head_dim
        dkv = 2 * columns * 2 * (ROWS * (1 if split else 2) + self.dkv_stages * self.dkv_block_q)
        dkv += 2 * 2 * 2 * ROWS * self.dkv_block_q + self.dkv_stages * self.dkv_block_q * 16
        return {"forward": forward, "dq": dq, "dkv": dkv}

    def registers_of(self, head_dim: int) -> dict[str, int]:
        """Registers that a computing thread needs, about, at a (padded) head size."""
        per_thread = 128
        # The output, the scores, and the probabilities in 16 bits, twice if the matmul reads those of the step before.
        forward = self.block_q * (2 * head_dim + (4 if self.registers else 3) * self.block_kv) // (2 * per_thread)
        dq = ROWS * (head_dim + 2 * self.dq_block_kv) // per_thread
        dkv = ROWS * (2 * min(head_dim, 128) + 2 * self.dkv_block_q) // per_thread
        return {name: n + _OTHER_REGISTERS for name, n in (("forward", forward), ("dq", dq), ("dkv", dkv))}

    def check(self, head_dim: int) -> None:
        """Raises ValueError, naming the field, unless the kernels can run with these tiles at this head size."""
        head_dim = padded_head_dim(head_dim)
        for name in ("block_q", "block_kv", "dq_block_kv", "dkv_block_q"):
            if getattr(self, name) <= 0 or getattr(self, name) % ROWS:
                raise ValueError(f"config.{name}={getattr(self, name)}; it must be a positive multiple of {ROWS}")
        for name in ("warpgroups", "dq_warpgroups"):
            if getattr(self, name) not in REGISTERS:
                raise ValueError(f"config.{name}={getattr(self, name)}; choose {', '.join(map(str, REGISTERS))}")
        # Of the forward pass a step's keys are read while the values of the step before still are.
        for name, least in (("stages", 2), ("dq_stages", 1), ("dkv_stages", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"config.{name}={getattr(self, name)}; it must be at least {least}")
        for kernel, size in self.smem_bytes(head_dim).items():
            if size > SMEM_BYTES:
                raise ValueError(
                    f"config={self}: the {kernel} kernel needs {size} bytes of shared memory at head_dim={head_dim}, "
                    f"and there are {SMEM_BYTES}"
                )
        for kernel, count in self.registers_of(head_dim).items():
            most = REGISTERS[{"forward": self.warpgroups, "dq": self.dq_warpgroups}.get(kernel, 2)][0]
            if count > most:
                raise ValueError(
                    f"config={self}: the {kernel} kernel needs about {count} registers a thread at "
                    f"head_dim={head_dim}, and there are {most}"
                )


def padded_head_dim(head_dim: int) -> int:
    """The head size that the kernels compute with: whole swizzles."""
    return -(-head_dim // COLUMNS) * COLUMNS


def splits_columns(head_dim: int) -> bool:
    """Whether two warpgroups share a tile of keys and each holds half of the columns of its dK and dV.

    Beyond 128 columns the two sums of a tile do not fit into a thread's registers.
    """
    return head_dim > 128


def heuristic(head_dim: int, softcap: float | None = None) -> GpuConfig:
    """The default: the widest steps that fit into shared memory and registers."""
    head_dim = padded_head_dim(head_dim)
    if head_dim <= 64:
        return GpuConfig(stages=3, dq_block_kv=128, dkv_stages=3)
    if head_dim <= 128:
        # Soft-capping keeps one more tile of values, for which there are registers at 64 keys.
        return GpuConfig(dq_block_kv=128 if softcap is None else 64)
    return GpuConfig(block_kv=64, dq_stages=2 if head_dim <= 192 else 1)


def config_for(config: GpuConfig | None, query: jax.Array, key: jax.Array, softcap: float | None) -> GpuConfig:
    """The given configuration, or the tuning table's, or the default; checked.

    Raises:
      ValueError: the kernels cannot run with it.
    """
    if config is None:
        _, queries, heads, head_dim = query.shape
        shape: dict[str, Any] = {"head_dim": head_dim, "queries": queries, "keys": key.shape[1]}
        shape |= {"heads": heads, "kv_heads": key.shape[2], "softcap": softcap is not None}
        config = tuned_config(GpuConfig, "flash_attention", chip(), query.dtype, **shape)
    if config is None:
        config = heuristic(query.shape[-1], softcap)
    config.check(query.shape[-1])
    return config


def why_not(query: Any, key: Any, value: Any, *, softcap: float | None, config: Any) -> str | None:
    """See `pallas_kernels.flash_attention.backend.Backend`."""
    del softcap
    if platform() == "gpu" and not _is_hopper(chip()):
        return f"the chip is {chip()!r}, and the kernels are for Hopper (H100, H200)"
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"query is {query.dtype}, and the tensor cores are fed bfloat16 or float16"
    if key.dtype != query.dtype or value.dtype != query.dtype:
        return f"query is {query.dtype}, key {key.dtype} and value {value.dtype}; they must be of one type"
    if query.shape[-1] > 256:
        return f"head_dim is {query.shape[-1]}, and the kernels take at most 256"
    if key.shape[0] * key.shape[2] > 65_535:
        return f"key has {key.shape[0]} * {key.shape[2]} rows of heads, and a grid at most 65535"
    if config is None:
        return None
    if not isinstance(config, GpuConfig):
        return f"config={config!r} is not a GpuConfig"
    try:
        config.check(query.shape[-1])
    except ValueError as error:
        return str(error)
    return None


def _is_hopper(kind: str | None) -> bool:
    """The one generation with these matmul instructions: later ones have others."""
    return kind is not None and re.search(r"\bG?H(20|100|200|800)\b", kind) is not None
