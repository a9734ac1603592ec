"""Context parallelism: ways to attend when the length of a sequence is cut over devices."""

from ml.parallel.context.order import Order, check_length, sequence_order
from ml.parallel.context.ring import RingAttention, ring_work
from ml.parallel.context.ulysses import UlyssesAttention

__all__ = ["Order", "RingAttention", "UlyssesAttention", "check_length", "ring_work", "sequence_order"]
