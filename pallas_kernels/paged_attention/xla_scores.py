"""What the loops over rows and over tiles of rows have in common."""

import jax.numpy as jnp

from pallas_kernels.platform import platform


def seen(position, kv_begin, kv_end, window):
    """The tokens ``low <= j < high`` that rows at ``position`` see of ``kv_begin .. kv_end - 1``."""
    low = kv_begin if window is None else jnp.maximum(kv_begin, position - window + 1)
    return low, jnp.minimum(kv_end, position + 1)


def capped(logits, softcap):
    """Logits under a soft cap."""
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def PRECISION():
    """Of products in float32, which accelerators would round their operands for."""
    return None if platform() == "cpu" else "highest"
