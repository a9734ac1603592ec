"""What attention over shared prefixes has to do: each shared run of tokens read once, and each row's own tokens."""

from collections.abc import Sequence

from pallas_kernels.roofline import Cost


def prefix(
    nodes: Sequence[tuple[int, int]], *, heads: int, kv_heads: int, head_dim: int, itemsize: int, cache_itemsize: int
) -> Cost:
    """Of the shared runs.

    Args:
      nodes: rows below each, and its tokens.
      heads, kv_heads, head_dim: of the model.
      itemsize: bytes of an element of the query and the result, which every node reads and writes.
      cache_itemsize: bytes of an element of the cache.
    """
    flops = sum(4.0 * rows * tokens * heads * head_dim for rows, tokens in nodes)
    cache = sum(2 * tokens * kv_heads * head_dim * cache_itemsize for _, tokens in nodes)
    return Cost(flops, cache + sum(2 * rows * heads * head_dim * itemsize for rows, _ in nodes))
