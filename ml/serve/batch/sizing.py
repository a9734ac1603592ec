"""How large a cache this machine has room for."""

import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ml.models import TransformerConfig
from ml.serve.placement import Placement

# Of the memory that is free: activations, logits and the compiler's buffers need some too; a CPU's is everybody's.
_PART_OF_DEVICE = 0.8
_PART_OF_HOST = 0.25


def cache_tokens(config: TransformerConfig, dtype: Any, longest: int, sequences: int, mesh: Mesh | None = None) -> int:
    """Tokens of a cache for so many sequences of at most ``longest`` tokens, or as many as there is room for.

    Args:
      config: of the model, whose parameters are in memory already.
      dtype: of keys and values.
      longest: tokens of a sequence; room for one there must be.
      sequences: that run at once.
      mesh: of the engine; each replica has a cache of this size.
    """
    kv_heads = Placement(config, mesh).on_one_device.num_kv_heads
    per_token = 2 * config.num_layers * kv_heads * config.head_dim * jnp.dtype(dtype).itemsize
    devices = jax.local_devices()[:1] if mesh is None else mesh.local_devices
    free = min(map(_free_bytes, devices))
    if devices[0].platform == "cpu":
        free //= len(devices)
    return max(longest, min(sequences * longest, free // per_token))


def _free_bytes(device: jax.Device) -> int:
    statistics = device.memory_stats() if device.platform != "cpu" else None
    if statistics and "bytes_limit" in statistics:
        return int((statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)) * _PART_OF_DEVICE)
    return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * _PART_OF_HOST)
