"""How large a cache this machine has room for."""

import os
from typing import Any

import jax
import jax.numpy as jnp

from ml.models import TransformerConfig

# Of the memory that is free: activations, logits and the compiler's buffers need some too; a CPU's is everybody's.
_PART_OF_DEVICE = 0.8
_PART_OF_HOST = 0.25


def cache_tokens(config: TransformerConfig, dtype: Any, longest: int, sequences: int) -> int:
    """Tokens of a cache for so many sequences of at most ``longest`` tokens, or as many as there is room for.

    Args:
      config: of the model, whose parameters are in memory already.
      dtype: of keys and values.
      longest: tokens of a sequence; room for one there must be.
      sequences: that run at once.
    """
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize
    return max(longest, min(sequences * longest, _free_bytes() // per_token))


def _free_bytes() -> int:
    device = jax.local_devices()[0]
    statistics = device.memory_stats() if device.platform != "cpu" else None
    if statistics and "bytes_limit" in statistics:
        return int((statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)) * _PART_OF_DEVICE)
    return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * _PART_OF_HOST)
