"""What flash attention has to do, from shapes alone: its roofline."""

from collections.abc import Sequence

from pallas_kernels.roofline import Cost

_FLOAT32 = 4


def causal_pairs(length: int, window: int | None = None) -> int:
    """Number of (query, key) pairs that see one another in one causal sequence."""
    window = length if window is None else min(window, length)
    return window * (window + 1) // 2 + (length - window) * window


def segment_pairs(lengths: Sequence[int], window: int | None = None) -> int:
    """The same in a row of packed segments."""
    return sum(causal_pairs(length, window) for length in lengths)


def forward(
    *, batch: int, queries: int, keys: int, heads: int, kv_heads: int, head_dim: int, itemsize: int, pairs: float
) -> Cost:
    """Of the forward pass.

    Args:
      batch: sequences.
      queries, keys: tokens in each.
      heads, kv_heads, head_dim: of the model.
      itemsize: bytes of an element of all operands.
      pairs: of query and key that see one another, over the whole batch.
    """
    tokens = batch * (queries * heads * 2 + keys * kv_heads * 2) * head_dim * itemsize  # q, out; k, v
    return Cost(4.0 * pairs * heads * head_dim, tokens + batch * queries * heads * _FLOAT32)


def backward(
    *, batch: int, queries: int, keys: int, heads: int, kv_heads: int, head_dim: int, itemsize: int, pairs: float
) -> Cost:
    """Of the backward pass, logits computed again: five products for the forward pass's two."""
    tokens = batch * (queries * heads * 4 + keys * kv_heads * 4) * head_dim * itemsize  # q, out, dout, dq; k, v, dk, dv
    return Cost(10.0 * pairs * heads * head_dim, tokens + batch * queries * heads * _FLOAT32)
