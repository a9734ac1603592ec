"""Batches on the mesh: this process's rows become global arrays."""

from collections.abc import Mapping

import jax
import numpy as np

from ml.parallel.rules import Rules


def place_batch(batch: Mapping[str, np.ndarray], rules: Rules, microbatches: int) -> dict[str, jax.Array]:
    """Puts this process's rows of a batch on the mesh as global arrays ``[microbatches, rows, length]``.

    Each process cuts its own rows into microbatches, so no row ever moves between processes.
    """
    sharding = rules.sharding(None, "batch", "length")

    def put(local: np.ndarray) -> jax.Array:
        rows = local.shape[0] // microbatches
        return jax.make_array_from_process_local_data(sharding, local.reshape(microbatches, rows, *local.shape[1:]))

    return {name: put(array) for name, array in batch.items()}
