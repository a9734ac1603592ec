"""Ulysses attention: the sequence is gathered and the heads are cut while attending."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int

from ml.errors import UserError
from ml.models.attention import AttentionLayer
from ml.models.parameters import Placement, unplaced
from ml.parallel.context.order import Order, check_length, chunks, chunks_taken
from ml.weights.shards import mesh_axes
from pallas_kernels.flash_attention import Implementation, flash_attention


@flax.struct.dataclass
class UlyssesAttention:
    """Exact attention over a sequence whose length is cut over a mesh axis (Jacobs et al. 2023, arXiv 2309.14509).

    An all-to-all gives each device all tokens of some heads; it attends as a single device would, and a second one
    gives back all heads of its tokens. Both are a `jax.reshard`, so their gradient is another all-to-all. Where there
    are fewer key/value heads than devices, each is repeated for the devices whose query heads share it.

    Attributes:
      segment_ids: documents packed in a row, cut as the rest of the batch; ``None``: each row is one document.
      place: maps logical axes of activations to mesh axes; the axis of ``length`` is the one to exchange with heads.
      order: how the columns of the batch were laid out, by `sequence_order`. The work is balanced in either.
      implementation: see `pallas_kernels.flash_attention`.
    """

    segment_ids: Int[Array, "batch length"] | None = None
    place: Placement = flax.struct.field(pytree_node=False, default=unplaced)
    order: Order = flax.struct.field(pytree_node=False, default="zigzag")
    implementation: Implementation = flax.struct.field(pytree_node=False, default="auto")

    def attend(
        self, layer: AttentionLayer, query: jax.Array, key: jax.Array, value: jax.Array, state: Any
    ) -> tuple[jax.Array, Any]:
        """See `ml.models.attention.AttentionStrategy.attend`; ``state`` passes through.

        Raises:
          UserError: the length does not divide into the chunks that the order wants, or the heads into the shards.
        """
        spec = self.place("batch", "length", "heads", "head_dim") or PartitionSpec(None, None, None, None)
        mesh, (batch, axis, tensor, _) = jax.sharding.get_abstract_mesh(), spec
        shards = 1 if axis is None else mesh.shape[axis]
        check_length(query.shape[1], shards, self.order)
        gathered = PartitionSpec(batch, None, (*mesh_axes(tensor), *mesh_axes(axis)) or None, None)
        times = _repeats(query.shape[2], key.shape[2], shards, 1 if tensor is None else mesh.shape[tensor])
        inverse = np.argsort(chunks(shards, self.order).reshape(-1))

        def exchange(x: jax.Array) -> jax.Array:
            return chunks_taken(x if mesh.empty else jax.reshard(x, gathered), inverse)

        segments = self.segment_ids
        if segments is not None:
            segments = chunks_taken(
                segments if mesh.empty else jax.reshard(segments, PartitionSpec(batch, None)), inverse
            )
        out = flash_attention(
            exchange(query),
            exchange(_repeated(key, times, spec)),
            exchange(_repeated(value, times, spec)),
            segment_ids=segments,
            window=layer.window,
            scale=layer.scale,
            softcap=layer.softcap,
            implementation=self.implementation,
        )
        out = chunks_taken(out, chunks(shards, self.order).reshape(-1))
        return out if mesh.empty else jax.reshard(out, spec), state


def _repeats(heads: int, kv_heads: int, shards: int, tensor: int) -> int:
    """How often a key/value head must be repeated so that each shard of the sequence can have whole heads."""
    local, local_kv = heads // tensor, kv_heads // tensor
    if local % shards == 0 and (local_kv % shards == 0 or shards % local_kv == 0):
        return max(1, shards // local_kv)
    valid = [n for n in range(1, local + 1) if local % n == 0 and (local_kv % n == 0 or n % local_kv == 0)]
    raise UserError(
        f"config.mesh.sequence={shards} with config.train.context='ulysses' does not fit {local} query heads and "
        f"{local_kv} key/value heads per shard of config.mesh.tensor={tensor}; "
        f"choose config.mesh.sequence from {valid}, or context='ring'"
    )


def _repeated(x: jax.Array, times: int, spec: PartitionSpec) -> jax.Array:
    """Every head ``times`` times in a row, on the shard that has it."""
    if times == 1:
        return x
    batch, length, heads, width = x.shape
    place = None if jax.sharding.get_abstract_mesh().empty else PartitionSpec(*spec[:3], None, None)
    x = jnp.broadcast_to(x[:, :, :, None], (batch, length, heads, times, width), out_sharding=place)
    return x.reshape(batch, length, heads * times, width)
