"""Which part of a sequence each device holds."""

from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from ml.errors import UserError

Order = Literal["zigzag", "contiguous"]


def chunks(shards: int, order: Order) -> Int[np.ndarray, "shards per_shard"]:
    """The chunks of a sequence that each shard holds, in the order in which it holds them.

    ``contiguous`` is one chunk each. ``zigzag`` cuts ``2 * shards`` chunks and gives shard ``i`` the chunks ``i`` and
    ``2 * shards - 1 - i``: one early, with few keys to see, and one late, with many, so that all work alike under a
    causal mask (Llama 3, arXiv 2407.21783, section 3.3.2; Striped Attention, Brandon et al. 2023, has the problem).
    """
    shard = np.arange(shards)
    return shard[:, None] if order == "contiguous" or shards == 1 else np.stack([shard, 2 * shards - 1 - shard], axis=1)


def sequence_order(length: int, shards: int, order: Order) -> Int[np.ndarray, " length"]:
    """The permutation of a batch's columns: column ``j`` on the mesh is column ``order[j]`` on the host.

    It belongs to everything that has a length: tokens, targets, segment ids, positions, loss mask.

    Args:
      length: tokens in a row.
      shards: degree of the ``sequence`` axis.
      order: see `chunks`.

    Raises:
      UserError: see `check_length`.
    """
    check_length(length, shards, order)
    table = chunks(shards, order)
    size = length // table.size
    return (table.reshape(-1, 1) * size + np.arange(size)).reshape(-1)


def check_length(length: int, shards: int, order: Order) -> None:
    """Checks that a row of ``length`` tokens can be cut.

    Raises:
      UserError: unknown order, or ``length`` is no multiple of the number of chunks.
    """
    if order not in get_args(Order):
        raise UserError(f"config.mesh.sequence_order={order!r}; choose {' or '.join(get_args(Order))}")
    count = chunks(shards, order).size
    if length < count or length % count:
        near = max(count, length - length % count)
        raise UserError(
            f"config.data.sequence_length={length} does not divide into the {count} chunks that "
            f"config.mesh.sequence={shards} in {order} order wants; choose a multiple of {count}, such as {near}"
        )


def chunks_taken(x: Any, order: Int[np.ndarray, " chunks"]) -> Any:
    """The chunks of axis 1 in another order; a NumPy array stays one."""
    if np.array_equal(order, np.arange(len(order))):
        return x
    xp = np if isinstance(x, np.ndarray) else jnp
    parts = xp.split(x, len(order), axis=1)
    return xp.concatenate([parts[chunk] for chunk in order], axis=1)
