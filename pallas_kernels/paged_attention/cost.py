"""What paged attention has to do, from lengths and shapes alone: its roofline."""

from collections.abc import Sequence

from pallas_kernels.roofline import Cost

_SCALE = 4


def cost(
    lengths: Sequence[int],
    query_lengths: Sequence[int] | None = None,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    itemsize: int,
    cache_itemsize: int,
    quantized: bool = False,
    window: int | None = None,
    starts: Sequence[int] | None = None,
) -> Cost:
    """Of one layer's call.

    Args:
      lengths: tokens of each sequence, the new ones included.
      query_lengths: new tokens of each; ``None``: one.
      heads, kv_heads, head_dim: of the model.
      itemsize: bytes of an element of the query and the result.
      cache_itemsize: bytes of an element of the cache.
      quantized: there are scales beside it.
      window: sliding window.
      starts: first token that is attended to; ``None``: 0.
    """
    query_lengths = [min(1, length) for length in lengths] if query_lengths is None else query_lengths
    starts = [0] * len(lengths) if starts is None else starts
    pairs = read = 0
    for length, rows, start in zip(lengths, query_lengths, starts, strict=True):
        for_row = [_visible(length - 1 - back, start, window) for back in range(rows)]
        pairs += sum(for_row)
        first = start if window is None else max(start, length - rows - window + 1)
        read += max(0, length - first) if rows else 0
    per_token = 2 * kv_heads * (head_dim * cache_itemsize + (_SCALE if quantized else 0))
    rows = sum(query_lengths)
    return Cost(4.0 * pairs * heads * head_dim, read * per_token + 2 * rows * heads * head_dim * itemsize)


def _visible(position: int, start: int, window: int | None) -> int:
    first = start if window is None else max(start, position - window + 1)
    return max(0, position + 1 - first)
