"""Ring attention: queries stay, keys and values go round."""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int

from ml.models.attention import AttentionLayer
from ml.models.parameters import Placement, unplaced
from ml.parallel.context.order import Order, check_length, chunks, chunks_taken
from ml.parallel.manual import manual
from pallas_kernels.flash_attention import Implementation, backend, own_backend
from pallas_kernels.flash_attention.intervals import Intervals, self_intervals, tile_bounds
from pallas_kernels.flash_attention.vjp import row_delta
from pallas_kernels.flash_attention.xla import XlaConfig
from pallas_kernels.log_sum_exp import merge


@flax.struct.dataclass
class RingAttention:
    """Exact attention over a sequence whose length is cut over a mesh axis (Liu et al. 2023, arXiv 2310.01889).

    Each device keeps its queries. Keys and values travel round the ring; their next transfer is issued before the work
    on those that are here, so that it can hide behind it. The backward pass sends them round once more, together with
    their gradients. Between the passes a device keeps its own queries, keys, values, outputs and log-sum-exps, so that
    memory falls with the number of devices.

    Attributes:
      segment_ids: documents packed in a row, cut as the rest of the batch; ``None``: each row is one document.
      place: maps logical axes of activations to mesh axes; the axis of ``length`` is the ring.
      order: how the columns of the batch were laid out, by `sequence_order`; see `ml.parallel.context.order.chunks`.
        ``zigzag`` balances the work of a causal mask; ``contiguous`` skips the part of the ring that lies beyond a
        static window, and such a window is balanced as it is.
      implementation: a backend of `pallas_kernels.flash_attention` (not ``cudnn``, ``splash`` or ``reference``).
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
          UserError: the length does not divide into the chunks that the order wants.
        """
        rows, queries, keys = (
            self.place("batch", "length", *rest) or PartitionSpec(*(None,) * (2 + len(rest)))
            for rest in ((), ("heads", "head_dim"), ("kv_heads", "head_dim"))
        )
        mesh, axis = jax.sharding.get_abstract_mesh(), rows[1]
        shards = 1 if axis is None else mesh.shape[axis]
        length = query.shape[1]
        check_length(length, shards, self.order)
        ring = _Ring(
            axis=axis,
            shards=shards,
            length=length,
            order=self.order,
            queries=queries,
            keys=keys,
            window=layer.window if isinstance(layer.window, int) else None,
            scale=layer.scale,
            softcap=layer.softcap,
            implementation=own_backend(self.implementation, query, key, value, softcap=layer.softcap),
        )
        segments = self.segment_ids
        if segments is not None:
            held = chunks(shards, self.order).reshape(-1)
            if not mesh.empty:
                segments = jax.reshard(segments, PartitionSpec(rows[0], None))  # 4 bytes a token
            segments = chunks_taken(segments, np.argsort(held))
        visible = chunks_taken(self_intervals(length, layer.window, segments), chunks(shards, self.order).reshape(-1))
        visible = jnp.asarray(visible)
        if not mesh.empty:
            query, key, value = jax.reshard((query, key, value), (queries, keys, keys))
            visible = jax.reshard(visible, ring.intervals(visible))
        return _attend(ring, query, key, value, visible), state


def ring_work(length: int, shards: int, order: Order, window: int | None = None) -> Int[np.ndarray, "shards steps"]:
    """How many (query, key) pairs each device computes at each step of the ring, by the rule that it decides by.

    Args:
      length: tokens in a row.
      shards: devices in the ring.
      order: see `ml.parallel.context.order.chunks`.
      window: sliding window, ``None``: all.
    """
    rows = self_intervals(length, window).reshape(chunks(shards, order).size, -1, 2)
    table, tiles = chunks(shards, order), _tiles(length, shards, order)
    per_shard = length // shards

    def computed(shard: int, step: int) -> int:
        visible = _local(rows[table[shard]].reshape(1, per_shard, 2), table[(shard - step) % shards], len(rows[0]))
        tile_q, tile_kv = tiles.tiles(per_shard, per_shard)
        visited = tile_bounds(visible, tile_q, tile_kv, per_shard)
        return int((visited.last - visited.first).sum()) * tile_q * tile_kv

    steps = _steps(length, shards, order, window)
    return np.array([[computed(shard, step) for step in range(steps)] for shard in range(shards)])


def _steps(length: int, shards: int, order: Order, window: int | None) -> int:
    """After how many steps no query sees any of the keys that are still to come."""
    if window is None:
        return shards
    table = chunks(shards, order)
    size = length // table.size

    def needed(step: int) -> bool:
        theirs = np.roll(table, step, axis=0)[:, None, :]  # of the shard that many steps back
        mine = table[:, :, None]
        return bool(((theirs <= mine) & ((theirs + 1) * size > mine * size - window + 1)).any())

    return 1 + max(step for step in range(shards) if needed(step))


def _local(intervals: Any, held: Any, size: int) -> Any:
    """Intervals of a sequence as intervals of the keys that a shard holds.

    A shard's chunks ascend, so that what a row sees of them is one interval again, whose ends are numbers of keys.

    Args:
      intervals: ``[batch, queries, 2]``.
      held: the shard's chunks.
      size: tokens in a chunk.
    """
    return sum((intervals - chunk * size).clip(0, size) for chunk in held)


def _tiles(length: int, shards: int, order: Order) -> XlaConfig:
    """Tiles that divide a chunk, so that none lies astride two that are far apart in the sequence."""
    size = length // chunks(shards, order).size
    tile_q, tile_kv = XlaConfig().tiles(size, size)
    return XlaConfig(tile_q=tile_q, tile_kv=tile_kv)


@dataclasses.dataclass(frozen=True)
class _Ring:
    """What is known of a ring when it is traced. ``axis`` is ``None`` where there is but one shard."""

    axis: str | None
    shards: int
    length: int
    order: Order
    queries: PartitionSpec
    keys: PartitionSpec
    window: int | None
    scale: float
    softcap: float | None
    implementation: str

    @property
    def steps(self) -> int:
        return _steps(self.length, self.shards, self.order, self.window)

    def intervals(self, visible: Intervals) -> PartitionSpec:
        """How intervals are cut: as the queries, but for a batch of one that holds for all."""
        return PartitionSpec(self.queries[0] if visible.shape[0] > 1 else None, self.axis, None)

    def shift(self, x: Any, hops: int = 1) -> Any:
        """Gives ``x`` to the device ``hops`` further on."""
        around = [(source, (source + hops) % self.shards) for source in range(self.shards)]
        return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, self.axis, around), x)

    def run(self, name: str, operands: tuple[Any, ...], visible: Any, step: Any) -> Any:
        """The backend's ``forward`` or ``backward``, float32, where the keys here come from ``step`` devices back."""
        shard = 0 if self.axis is None else jax.lax.axis_index(self.axis)
        table = chunks(self.shards, self.order)
        held = jnp.asarray(table, jnp.int32)[(shard - step) % self.shards]
        local = _local(visible, [held[i] for i in range(table.shape[1])], self.length // table.size)
        tiles = _tiles(self.length, self.shards, self.order) if self.implementation == "xla" else None
        options = {"scale": self.scale, "softcap": self.softcap, "out_dtype": jnp.float32, "config": tiles}
        return getattr(backend(self.implementation), name)(*operands, local, **options)

    def manual(self, body: Any, in_specs: Any, out_specs: Any) -> Any:
        # Pallas calls do not say over which axes their results vary.
        return manual(body, in_specs, out_specs, check_vma=self.implementation == "xla")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring: _Ring, query, key, value, visible):
    return _forward(ring, query, key, value, visible)[0]


def _forward(ring: _Ring, query, key, value, visible):
    def body(query, key, value, visible):
        def part(keys, step):
            return ring.run("forward", (query, *keys), visible, step)

        def turn(carry, step):
            keys, result = carry
            following = ring.shift(keys)
            return (following, merge(result, part(keys, step))), None

        keys = (key, value)
        following = ring.shift(keys) if ring.steps > 1 else keys
        result = part(keys, 0)
        if ring.steps > 1:
            (last, result), _ = jax.lax.scan(turn, (following, result), jnp.arange(1, ring.steps - 1))
            result = merge(result, part(last, ring.steps - 1))
        return result[0].astype(query.dtype), result[1]

    in_specs = (ring.queries, ring.keys, ring.keys, ring.intervals(visible))
    mapped = ring.manual(body, in_specs, (ring.queries, PartitionSpec(*ring.queries[:3])))
    out, lse = mapped(query, key, value, visible)
    return out, (query, key, value, visible, out, lse)


def _backward(ring: _Ring, saved, out_gradient):
    def body(query, key, value, visible, out, lse, out_gradient):
        rows = lse, row_delta(out, out_gradient), out_gradient

        def part(keys, step):
            dq, dk, dv = ring.run("backward", (query, *keys, *rows), visible, step)
            return dq, (dk, dv)

        def turn(carry, step, more=True):
            keys, dq, dkeys = carry
            # The gradient of the keys that are here, as far as the devices behind have summed it.
            following, dkeys = ring.shift(keys) if more else keys, ring.shift(dkeys)
            here = part(keys, step)
            dq, dkeys = jax.tree.map(jnp.add, (dq, dkeys), here)
            return (following, dq, dkeys), None

        keys = (key, value)
        following = ring.shift(keys) if ring.steps > 1 else keys
        dq, dkeys = part(keys, 0)
        if ring.steps > 1:
            carry, _ = jax.lax.scan(turn, (following, dq, dkeys), jnp.arange(1, ring.steps - 1))
            (_, dq, dkeys), _ = turn(carry, ring.steps - 1, more=False)
            dkeys = ring.shift(dkeys, 1 - ring.steps)  # home
        return dq.astype(query.dtype), dkeys[0].astype(key.dtype), dkeys[1].astype(value.dtype)

    visible = saved[3]
    inputs = (ring.queries, ring.keys, ring.keys, ring.intervals(visible))
    in_specs = (*inputs, ring.queries, PartitionSpec(*ring.queries[:3]), ring.queries)
    return *ring.manual(body, in_specs, (ring.queries, ring.keys, ring.keys))(*saved, out_gradient), None


_attend.defvjp(_forward, _backward)
