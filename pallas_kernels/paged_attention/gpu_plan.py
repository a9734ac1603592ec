"""What the kernel of paged attention is built for, and how it reads its buffers."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

_NEW = hasattr(plgpu, "InterpretGPUParams")  # JAX 0.11


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known when the kernel is built."""

    split: bool
    ordered: bool
    block: int
    stages: int
    warpgroups: int
    workers: int
    kv_heads: int
    head_dim: int
    page_size: int
    dtype: Any
    kept: Any  # type of the cache
    scale: float
    softcap: float | None
    windowed: bool
    rows: int  # of a warpgroup's tile that are loaded and stored, a multiple of 8
    gathered_scales: bool
    # Add products to sums within wgmma, which saves registers that heads of more than 128 need. The interpreter cannot.
    # A product of zeros leaves a sum's bits either way.
    in_place: bool

    @property
    def part(self) -> int:
        """Tokens of a stage that one warpgroup multiplies."""
        return self.block // self.warpgroups if self.split else self.block

    @property
    def parts(self) -> int:
        """Parts of a stage."""
        return self.block // self.part

    @property
    def buffers(self) -> int:
        """Of queries: of a split launch, whose pieces are short, the next piece's are loaded meanwhile."""
        return 2 if self.split else 1

    @property
    def sheets(self) -> int:
        """Warpgroup tiles of rows."""
        return 1 if self.split else self.warpgroups

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread that loads and one that computes, where two warpgroups do: together those of the launch.

        The loader of wide heads has fewer pages to a stage, so that it can spare some.
        """
        return (24, 240) if self.quantized and self.head_dim > 128 else (40, 232)

    @property
    def quantized(self) -> bool:
        """Whether keys and values are kept in another type than is computed with."""
        return self.kept != self.dtype

    @property
    def copy(self) -> int:
        """Tokens of one TMA."""
        return min(self.page_size, self.part)


def tiled(width: int, dtype: Any) -> tuple:
    """The transforms of a buffer of rows of ``width`` that wgmma and TMA share."""
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle(width * bits)
    transforms: Any = plgpu  # whose classes a type checker takes for abstract
    return (transforms.TilingTransform((8, 8 * swizzle // bits)), transforms.SwizzleTransform(swizzle))


def load(ref: Any, layout: Any) -> Any:
    """The array that a reference refers to, laid out over the warpgroup's registers."""
    # JAX 0.10 wants an index of its own.
    index = () if _NEW else ((),)
    return plgpu.load(ref, *index, layout=layout, optimized=False)


def transposed(ref: Any) -> Any:
    """A view of a matrix with its axes exchanged; JAX 0.10 has a function for it."""
    return ref.transpose((1, 0)) if _NEW else plgpu.transpose_ref(ref, (1, 0))
