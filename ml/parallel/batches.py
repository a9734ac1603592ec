"""Which rows of a batch a process loads, and how they get onto its devices.

Derived from the batch's sharding, not from the number of processes: processes that differ only along the tensor,
sequence or stage axis hold the same rows, and on a TPU pod the devices of one host may hold parts of the batch that do
not lie side by side.
"""

from collections.abc import Mapping

import jax
import numpy as np

from ml.parallel.context.order import sequence_order
from ml.parallel.rules import Rules


def loader_share(rules: Rules) -> tuple[tuple[int, ...], int]:
    """The parts of every microbatch that this process's devices hold.

    Returns:
      ``(parts, count)``: of ``count`` equal parts of the rows, in their order, the numbers of those that are needed
      here, ascending; for `ml.data.make_loader`'s ``shard_index`` and ``shard_count``.
    """
    count = rules.batch_shards
    indices = rules.sharding("batch").addressable_devices_indices_map((count,)).values()
    parts = {(index[0].start or 0) if index is not None else 0 for index in indices}
    return tuple(sorted(parts)), count


def batch_axes(rank: int) -> tuple[str | None, ...]:
    """The logical axes of an array ``[microbatches, rows, ...]`` on the mesh, one of whose rows has ``rank - 1`` axes.

    Rows of one axis are sequences, which the mesh may cut; rows of more (images) stay whole.
    """
    return (None, "batch", "length") if rank == 2 else (None, "batch", *[None] * (rank - 1))


def place_batch(batch: Mapping[str, np.ndarray], rules: Rules, microbatches: int) -> dict[str, jax.Array]:
    """Puts this process's rows of a batch on the mesh as global arrays ``[microbatches, rows, ...]``.

    Where the length of sequences is cut, columns are dealt to its shards in the order that balances their work.

    Args:
      batch: arrays ``[microbatches * local rows, ...]``: of each microbatch the parts that `loader_share` names, whole
        in length.
      rules: the mesh, and how a batch lies on it.
      microbatches: how many there are, one after another.
    """
    parts, count = loader_share(rules)
    first = {part: position for position, part in enumerate(parts)}

    def put(local: np.ndarray) -> jax.Array:
        axes = batch_axes(local.ndim)
        sharding = rules.sharding(*axes)
        if "length" in axes:
            local = local[:, sequence_order(local.shape[-1], rules.mesh.shape["sequence"], rules.sequence_order)]
        held = local.reshape(microbatches, len(parts), -1, *local.shape[1:])
        size = held.shape[2]

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            _, rows, *rest = index
            return held[:, first[(rows.start or 0) // size]][:, :, *rest]

        return jax.make_array_from_callback((microbatches, count * size, *local.shape[1:]), sharding, shard)

    return {name: put(array) for name, array in batch.items()}
