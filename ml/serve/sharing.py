"""What the rows of a step share: a plan, of one shape per number of rows, so that few programs are compiled."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from ml.models import TransformerConfig
from ml.serve.engine_config import EngineConfig
from pallas_kernels.paged_attention import PagedCache
from pallas_kernels.paged_attention.core import resolve
from pallas_kernels.paged_attention.segments import Segments, ordered_block
from pallas_kernels.shared_prefix_attention import Crossover, Shapes, SharedPrefixPlan, crossover, make_plan

# Nesting of plans. Deeper trees are rare, and a level that is not needed costs little: no tokens, only a merge.
_LEVELS = 2
# Fewer rows would save less than half of what they read, and each number of rows is a program more to compile.
_FEWEST_ROWS = 4


class Sharing:
    """Decides step by step whether a prefix is read once for all rows that share it."""

    def __init__(self, config: TransformerConfig, settings: EngineConfig, cache: PagedCache):
        self.enabled = settings.share != "never"
        self._page_size = settings.page_size
        self._granularity = ordered_block(settings.page_size) if settings.invariant else settings.page_size
        self._crossover = Crossover.always() if settings.share == "always" else None
        dtype = np.dtype(settings.dtype)
        query = jnp.zeros((1, config.num_heads, config.head_dim), dtype)
        self._shapes = Shapes(
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            page_size=settings.page_size,
            dtype=dtype.name,
            cache_dtype=cache.key.dtype.name,
            implementation=resolve(query, cache, True, settings.implementation),
        )

    def possible(self, rows: int) -> bool:
        """Whether steps of a program for so many rows may have a plan."""
        return self.enabled and rows >= _FEWEST_ROWS

    @property
    def crossover(self) -> Crossover:
        """What sharing costs and saves on this device; measured when it is first asked for, unless that was before."""
        if self._crossover is None:
            self._crossover = crossover(self._shapes)
        return self._crossover

    def plan(
        self,
        block_table: Int[np.ndarray, "rows pages_per_row"],
        lengths: Int[np.ndarray, " rows"],
        query_starts: Int[np.ndarray, " rows+1"] | None,
        tokens: int,
    ) -> SharedPrefixPlan | None:
        """What the rows share; ``None``: nothing that pays.

        Args:
          block_table: pages of each row.
          lengths: tokens of each row, those fed included; 0: padding.
          query_starts: where each row's tokens begin; ``None``: one each.
          tokens: tokens fed, padding included.
        """
        first = block_table[lengths > self._granularity, 0]
        if not self.possible(len(lengths)) or len(np.unique(first)) == len(first):
            return None
        plan = make_plan(
            block_table,
            lengths,
            query_starts,
            page_size=self._page_size,
            rows=tokens,
            crossover=self.crossover,
            granularity=self._granularity,
            max_levels=_LEVELS,
        )
        rows = len(lengths)
        if not plan.levels or len(plan.level) > _nodes(rows):
            return None
        blank = self.blank(rows, tokens)
        nodes: Any = {f.name: _padded(getattr(plan.nodes, f.name), _nodes(rows)) for f in dataclasses.fields(Segments)}
        covered = np.array(blank.covered)
        covered[: plan.levels] = plan.covered
        return dataclasses.replace(
            blank,
            order=np.asarray(plan.order, np.int32),
            inverse=np.asarray(plan.inverse, np.int32),
            nodes=Segments(**nodes),
            level=_padded(plan.level, _nodes(rows)),
            covered=covered,
            starts=np.asarray(plan.starts, np.int32),
        )

    def blank(self, rows: int, tokens: int) -> SharedPrefixPlan:
        """A plan of the shape that all plans for so many rows and tokens have, which shares nothing."""
        nodes = np.zeros((6, _nodes(rows)), np.int32)
        order = np.arange(tokens, dtype=np.int32)
        return SharedPrefixPlan(
            order=order,
            inverse=order,
            nodes=Segments(*nodes),
            level=nodes[0],
            covered=np.zeros((_LEVELS, tokens), bool),
            starts=np.zeros(rows, np.int32),
            levels=_LEVELS,
            granularity=self._granularity,
        )


def _nodes(rows: int) -> int:
    """Room for a plan's nodes: each is shared by two rows at least, on each of two levels."""
    return 1 << (rows - 1).bit_length()


def _padded(x: Any, size: int) -> np.ndarray:
    x = np.asarray(x, np.int32)
    return np.pad(x, (0, size - len(x)))
