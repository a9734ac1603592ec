"""Attention over shared prefixes at real models' shapes, as serving compiles it for machines that need not be here."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from pallas_kernels.cases import Case
from pallas_kernels.paged_attention.cases import SHAPES, arguments
from pallas_kernels.paged_attention.segments import ordered_block
from pallas_kernels.shared_prefix_attention import Crossover, make_plan, shared_prefix_attention

_PAGE = 64
_BATCH, _PREFIX, _GROUP, _MIDDLE, _OWN = 256, 8192, 16, 512, 256  # sequences, and tokens


def cases() -> Iterator[Case]:
    """Decoding below one prefix, and below a tree of two levels; quantized, and in the fixed order."""

    def case(kind: str, model: str, dtype: str, levels: int, **options: Any) -> Case:
        tokens = _PREFIX + _OWN + (_MIDDLE if levels == 2 else 0)
        operands = arguments(model, dtype, _PAGE, batch=_BATCH, tokens=tokens)
        function = functools.partial(shared_prefix_attention, **options)
        return Case(f"shared_prefix_attention/{kind}/{model}/{dtype}", function, (*operands, plan(levels)))

    for model in SHAPES:
        yield case("prefix", model, "bfloat16", 1)
    yield case("tree", "llama3_8b", "bfloat16", 2)
    yield case("prefix", "llama3_8b", "int8", 1)
    yield case("invariant", "llama3_8b", "bfloat16", 1, invariant=True)


def plan(levels: int) -> Any:
    """Shapes of a plan in which all share a prefix and, with two levels, groups share more below it."""
    prefix, middle, own = (tokens // _PAGE for tokens in (_PREFIX, _MIDDLE if levels == 2 else 0, _OWN))
    row = np.arange(_BATCH)[:, None]
    parts = [
        np.tile(np.arange(prefix), (_BATCH, 1)),
        prefix + row // _GROUP * middle + np.arange(middle),
        prefix + _BATCH * (middle + row) + np.arange(own),
    ]
    table = np.concatenate(parts, axis=1).astype(np.int32)
    lengths = np.full(_BATCH, table.shape[1] * _PAGE, np.int32)
    made = make_plan(table, lengths, page_size=_PAGE, crossover=Crossover.always(), granularity=ordered_block(_PAGE))
    if made.levels != levels:
        raise ValueError(f"the plan has {made.levels} levels, not {levels}")
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), made)
