"""Which tiles of the score matrix a TPU kernel visits, as a list in scalar memory that its grid walks.

A grid over all pairs of tiles would spend a step on each empty one. The list holds only those in which some query sees
some key, in the order in which their results accumulate, so that empty tiles are neither fetched nor computed.
"""

import dataclasses
import itertools

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

# What a step has to do, one bit each: begin a major tile's sum, end it, multiply with a mask, multiply without one,
# begin an entry of the batch, end it.
FIRST, LAST, MASKED, FULL, ENTRY_FIRST, ENTRY_LAST = 1, 2, 4, 8, 16, 32
_FLAG_BITS, _TILE_BITS = 6, 16
# A step takes two words of the scalar memory (1 MiB on every chip so far), of which half is left to the compiler.
MAX_STEPS = 2**16


@dataclasses.dataclass(frozen=True)
class Steps:
    """The steps of a grid's last axis; ``count`` of them are real.

    ``major`` names the tile whose sum a step adds to (and the batch entry, where entries differ), ``minor`` the tile
    that it reads and its flags.
    """

    major: Int[Array, " steps"]
    minor: Int[Array, " steps"]
    count: Int[Array, ""]


def visits(
    intervals: Int[Array, "batch queries 2"], block_q: int, block_kv: int, keys: int
) -> tuple[Bool[Array, "batch q_tiles kv_tiles"], Bool[Array, "batch q_tiles kv_tiles"]]:
    """Tiles in which a query sees a key, and those in which every query sees every key.

    Args:
      intervals: keys ``start <= j < stop`` that each query sees, all within ``0 .. keys``; whole tiles of queries.
      block_q, block_kv: the size of a tile.
      keys: number of keys, without padding.
    """
    tiles = -(-keys // block_kv)
    rows = intervals.reshape(intervals.shape[0], -1, block_q, 1, 2)
    first = jnp.arange(tiles, dtype=jnp.int32) * block_kv
    start, stop = jnp.maximum(rows[..., 0], first), jnp.minimum(rows[..., 1], first + block_kv)
    return (start < stop).any(axis=2), (stop - start == block_kv).all(axis=2)


def steps(
    visit: Bool[Array, "batch major_tiles minor_tiles"], full: Bool[Array, "batch major_tiles minor_tiles"]
) -> Steps:
    """The visited tiles in order; a major tile without any still gets a step, which writes zeros."""
    majors, minors = visit.shape[1:]
    blind = ~visit.any(axis=2, keepdims=True) & (jnp.arange(minors) == 0)
    listed = (visit | blind).reshape(-1)
    place = jnp.arange(listed.size, dtype=jnp.int32)
    place = jnp.sort(jnp.where(listed, place, listed.size))  # far cheaper on a TPU than a scatter
    count = listed.sum(dtype=jnp.int32)
    place = jnp.minimum(place, listed.size - 1)
    kind = jnp.where(full, FULL, jnp.where(visit, MASKED, 0)).astype(jnp.int32).reshape(-1)[place]
    major, minor = place // minors, place % minors
    entry = major // majors
    flags = kind | _ends(major, count, FIRST, LAST) | _ends(entry, count, ENTRY_FIRST, ENTRY_LAST)
    return Steps(entry << _TILE_BITS | major % majors, minor << _FLAG_BITS | flags, count)


def _ends(x: Int[Array, " steps"], count: Int[Array, ""], first: int, last: int) -> Int[Array, " steps"]:
    """Flags where a run of equal values begins and ends; ``count`` values are real."""
    index = jnp.arange(x.size, dtype=jnp.int32)
    begins = (index == 0) | (x != jnp.roll(x, 1))
    ends = (index == count - 1) | (x != jnp.roll(x, -1))
    return jnp.where(begins, first, 0) | jnp.where(ends, last, 0)


def batch_of(major):
    """The entry of the batch, to be added to the grid's own."""
    return major >> _TILE_BITS


def major_of(major):
    """The tile whose sum the step adds to."""
    return major & (2**_TILE_BITS - 1)


def minor_of(minor):
    """The tile that the step reads."""
    return minor >> _FLAG_BITS


def fit(length: int, block: int, lanes: int = 128) -> int:
    """The size of the tiles, at most ``block``, of which a whole number covers ``length`` with the least left over."""
    count = -(-length // block)
    return min(block, -(-length // count // lanes) * lanes)


def chunks(size: int, most: int, lanes: int = 128) -> list[tuple[int, int]]:
    """Beginning and size of the nearly equal parts, at most ``most``, in which a tile is multiplied."""
    units, count = size // lanes, -(-size // most)
    edges = [units * i // count * lanes for i in range(count + 1)]
    return [(a, b - a) for a, b in itertools.pairwise(edges)]
