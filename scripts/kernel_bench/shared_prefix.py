"""Cases of attention over shared prefixes: many sequences below one prefix, a tree of two levels, and small groups."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from kernel_bench import peers_torch
from kernel_bench.case import BenchCase, Built
from kernel_bench.paged import Shape, contiguous, cost_of, make_cache
from kernel_bench.timing import Program
from pallas_kernels.roofline import Cost
from pallas_kernels.shared_prefix_attention import cost


@dataclasses.dataclass(frozen=True)
class Batch:
    """``batch`` sequences in groups of ``group``, the groups below one prefix.

    Attributes:
      batch: sequences, decoding.
      prefix: tokens that all share.
      own: tokens of each alone.
      group: sequences that share ``middle`` more tokens; 0: no second level.
      middle: those.
    """

    batch: int
    prefix: int
    own: int
    group: int = 0
    middle: int = 0

    @property
    def nodes(self) -> list[tuple[int, int]]:
        """Rows and tokens of what is shared."""
        groups = [(self.group, self.middle)] * (self.batch // self.group) if self.group else []
        return [(self.batch, self.prefix), *groups]


# Bytes of copies that are made at least, if so many layers have them: more than a processor's cache holds.
_COPIED = 2**28
_ACCELERATOR = {
    "256_below_8k": Batch(256, 8192, 256),
    "64_below_8k": Batch(64, 8192, 256),
    "256_below_2k": Batch(256, 2048, 256),
    "16_below_2k": Batch(16, 2048, 256),
    "256_below_8k_and_16_below_512": Batch(256, 8192, 256, 16, 512),
    "4_below_512": Batch(4, 512, 512),
    "1024_below_2k": Batch(1024, 2048, 128),
}
_CPU = {
    "64_below_2k": Batch(64, 2048, 64),
    "16_below_1k": Batch(16, 1024, 64),
    "64_below_1k_and_16_below_256": Batch(64, 1024, 64, 16, 256),
    "4_below_256": Batch(4, 256, 256),
    "2_below_64": Batch(2, 64, 512),
}


def cases(platform: str, cache_bytes: float) -> Iterator[BenchCase]:
    """Those for a platform, the most telling first."""
    for name, batch in (_CPU if platform == "cpu" else _ACCELERATOR).items():
        options: Any = {}
        if platform == "cpu":
            options = {"heads": 8, "kv_heads": 4, "head_dim": 64, "dtype": "float32", "cache_dtype": "float32"}
        yield _case(name, batch, Shape((batch.prefix + batch.middle + batch.own,) * batch.batch, **options), platform)


def _case(name: str, batch: Batch, shape: Shape, platform: str) -> BenchCase:
    itemsize = 4 if shape.dtype == "float32" else 2
    sizes = {"heads": shape.heads, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim}
    shared: Cost = cost.prefix(batch.nodes, **sizes, itemsize=itemsize, cache_itemsize=itemsize)
    own = cost_of(dataclasses.replace(shape, lengths=(batch.own,) * batch.batch))
    settings = dataclasses.asdict(batch) | sizes | {"page_size": shape.page_size, "dtype": shape.dtype}
    build = functools.partial(_build, batch, shape, platform)
    return BenchCase(name, settings, shared + own, shape.dtype, build, (shared, own))


def _table(batch: Batch, page_size: int) -> tuple[np.ndarray, int]:
    """Pages in random order, those of shared runs in the rows of all that share them."""
    shared, middle, own = (-(-tokens // page_size) for tokens in (batch.prefix, batch.middle, batch.own))
    groups = batch.batch // batch.group if batch.group else 0
    total = shared + groups * middle + batch.batch * own
    free = iter(np.random.default_rng(0).permutation(total).astype(np.int32).tolist())

    def take(count: int) -> list[int]:
        return [next(free) for _ in range(count)]

    prefix = take(shared)
    middles = [take(middle) for _ in range(groups)]
    rows = [prefix + (middles[i // batch.group] if groups else []) + take(own) for i in range(batch.batch)]
    return np.array(rows, np.int32), total


def _build(batch: Batch, shape: Shape, platform: str, peers: bool) -> Built:
    import jax
    import jax.numpy as jnp

    from pallas_kernels.shared_prefix_attention import Crossover, Shapes, crossover, make_plan

    table, pages = _table(batch, shape.page_size)
    layers = 8  # as in a model, one after the other: no call finds its keys in the chip's cache
    cache = make_cache(shape, layers, pages)
    query = jax.random.normal(jax.random.key(2), (batch.batch, shape.heads, shape.head_dim), shape.dtype)
    lengths = np.array(shape.lengths, np.int32)

    def sets(plan: Any) -> list:
        tail = (jnp.array(table), jnp.array(lengths), jax.tree.map(jnp.asarray, plan))
        return [(query, cache, jnp.int32(layer), *tail) for layer in range(layers)]

    def shared(query: Any, cache: Any, layer: Any, table: Any, lengths: Any, plan: Any, name: Any = platform) -> Any:
        from pallas_kernels.shared_prefix_attention import shared_prefix_attention

        return shared_prefix_attention(query, cache, layer, table, lengths, plan, implementation=name)

    def unshared(query: Any, cache: Any, layer: Any, table: Any, lengths: Any, plan: Any, name: Any = platform) -> Any:
        from pallas_kernels.paged_attention import paged_attention

        return paged_attention(query, cache, layer, table, lengths, implementation=name)

    options: Any = {"page_size": shape.page_size}
    always = make_plan(table, lengths, crossover=Crossover.always(), **options)
    programs = [
        Program("ours/shared", shared, sets(always)),
        Program("ours/unshared", unshared, sets(always)),
        Program("xla/shared", functools.partial(shared, name="xla"), sets(always)),
        Program("xla/unshared", functools.partial(unshared, name="xla"), sets(always)),
    ]
    failed: dict[str, str] = {}
    outputs: dict[str, Any] = {}
    sizes: Any = {"heads": shape.heads, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim}
    types: Any = {"dtype": shape.dtype, "cache_dtype": shape.cache_dtype, "implementation": platform}
    try:
        measured = crossover(Shapes(page_size=shape.page_size, **sizes, **types))
        programs.append(
            Program("ours/by_crossover", shared, sets(make_plan(table, lengths, crossover=measured, **options)))
        )
    except Exception as error:
        failed["ours/by_crossover"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if platform == "cpu":  # elsewhere the copies might not fit
        programs.append(Program("ours/copies", unshared, _copies(cache, table, sets(always))))
    if peers and platform == "cpu" and peers_torch.available():
        copies = [contiguous(shape, query, cache, layer, jnp.array(table)) for layer in range(layers)]
        programs.append(peers_torch.sdpa("torch/sdpa", copies))
        outputs["torch/sdpa"] = lambda x: x.reshape(query.shape)
    return Built(programs, {program.name: lambda x: x for program in programs} | outputs, failed)


def _copies(cache: Any, table: np.ndarray, sets: list) -> list:
    """The operands of some layers, where each row has pages of its own, in random order, for all of its tokens."""
    import jax
    import jax.numpy as jnp

    layers = -(-_COPIED // (2 * table.size * cache.key[0, 0].nbytes))
    own = np.random.default_rng(1).permutation(table.size).astype(np.int32)
    copies = jax.tree.map(lambda x: x[:layers, table.reshape(-1)[np.argsort(own)]], cache)
    own_table = jnp.array(own.reshape(table.shape))
    return [(query, copies, layer, own_table, *rest) for query, _, layer, _, *rest in sets[:layers]]
