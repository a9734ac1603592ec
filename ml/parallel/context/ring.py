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
from ml.parallel.context.order import Order, check_length, chunks
from ml.parallel.manual import manual
from pallas_kernels.flash_attention import partial


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
    """

    segment_ids: Int[Array, "batch length"] | None = None
    place: Placement = flax.struct.field(pytree_node=False, default=unplaced)
    order: Order = flax.struct.field(pytree_node=False, default="zigzag")

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
        length, static = query.shape[1], layer.window if isinstance(layer.window, int) else None
        check_length(length, shards, self.order)
        ring = _Ring(
            axis,
            shards,
            length,
            self.order,
            rows,
            queries,
            keys,
            static,
            layer.scale,
            layer.softcap,
        )
        segments, window = self.segment_ids, layer.window if static is None else None
        if not mesh.empty:
            query, key, value = jax.reshard((query, key, value), (queries, keys, keys))
            segments = segments if segments is None else jax.reshard(segments, rows)
        return _attend(ring, query, key, value, segments, window), state


def ring_work(length: int, shards: int, order: Order, window: int | None = None) -> Int[np.ndarray, "shards steps"]:
    """How many (query, key) pairs each device computes at each step of the ring, by the rule that it decides by.

    Args:
      length: tokens in a row.
      shards: devices in the ring.
      order: see `ml.parallel.context.order.chunks`.
      window: sliding window, ``None``: all.
    """
    blocks = partial.fit_blocks(length // chunks(shards, order).size)
    index = [_index(shard, length, shards, order) for shard in range(shards)]

    def computed(shard: int, step: int) -> int:
        pairs = partial.visible_blocks(index[shard], index[(shard - step) % shards], window, blocks)
        return int(pairs.sum()) * blocks[0] * blocks[1]

    steps = _steps(length, shards, order, window)
    return np.array([[computed(shard, step) for step in range(steps)] for shard in range(shards)])


@functools.cache
def _steps(length: int, shards: int, order: Order, window: int | None) -> int:
    """After how many steps no query sees any of the keys that are still to come."""
    if window is None:
        return shards
    size = length // chunks(shards, order).size
    index = [_index(shard, length, shards, order) for shard in range(shards)]

    def needed(step: int) -> bool:
        pairs = ((index[shard], index[(shard - step) % shards]) for shard in range(shards))
        return any(partial.visible_blocks(q, k, window, (size, size)).any() for q, k in pairs)

    return 1 + max(step for step in range(shards) if needed(step))


def _index(shard: Any, length: int, shards: int, order: Order) -> Any:
    """The index in the sequence of each token that a shard, which may be traced, holds."""
    table = chunks(shards, order)
    size = length // table.size
    held = table[shard] if isinstance(shard, int) else jnp.asarray(table, jnp.int32)[shard]
    return (held[:, None] * size + np.arange(size, dtype=np.int32)).reshape(-1)


@dataclasses.dataclass(frozen=True)
class _Ring:
    """What is known of a ring when it is traced. ``axis`` is ``None`` where there is but one shard."""

    axis: str | None
    shards: int
    length: int
    order: Order
    rows: PartitionSpec
    queries: PartitionSpec
    keys: PartitionSpec
    window: int | None
    scale: float
    softcap: float | None

    @property
    def steps(self) -> int:
        return _steps(self.length, self.shards, self.order, self.window)

    def shift(self, x: Any, hops: int = 1) -> Any:
        """Gives ``x`` to the device ``hops`` further on."""
        around = [(source, (source + hops) % self.shards) for source in range(self.shards)]
        return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, self.axis, around), x)

    def mask(self, step: Any, segments: Any, key_segments: Any, window: Any) -> dict[str, Any]:
        """The arguments of `partial` that say who sees whom when the keys here come from ``step`` devices back."""
        shard = 0 if self.axis is None else jax.lax.axis_index(self.axis)
        return {
            "query_index": _index(shard, self.length, self.shards, self.order),
            "key_index": _index((shard - step) % self.shards, self.length, self.shards, self.order),
            "query_segments": segments,
            "key_segments": key_segments,
            "window": self.window if window is None else window,
            "scale": self.scale,
            "softcap": self.softcap,
            "blocks": partial.fit_blocks(self.length // chunks(self.shards, self.order).size),
        }


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring: _Ring, query, key, value, segments, window):
    return _forward(ring, query, key, value, segments, window)[0]


def _forward(ring: _Ring, query, key, value, segments, window):
    def body(query, key, value, segments, window):
        def part(keys, step):
            key, value, key_segments = keys
            return partial.forward(query, key, value, **ring.mask(step, segments, key_segments, window))

        def turn(carry, step):
            keys, result = carry
            following = ring.shift(keys)
            return (following, partial.merge(result, part(keys, step))), None

        keys = (key, value, segments)
        following = ring.shift(keys) if ring.steps > 1 else keys
        result = part(keys, 0)
        if ring.steps > 1:
            (last, result), _ = jax.lax.scan(turn, (following, result), jnp.arange(1, ring.steps - 1))
            result = partial.merge(result, part(last, ring.steps - 1))
        return result[0].astype(query.dtype), result[1]

    in_specs = (ring.queries, ring.keys, ring.keys, ring.rows, PartitionSpec())
    mapped = manual(body, in_specs, (ring.queries, PartitionSpec(*ring.queries[:3])))
    out, lse = mapped(query, key, value, segments, window)
    return out, (query, key, value, segments, window, out, lse)


def _backward(ring: _Ring, saved, out_gradient):
    def body(query, key, value, segments, window, out, lse, out_gradient):
        def part(keys, step):
            key, value, key_segments = keys
            mask = ring.mask(step, segments, key_segments, window)
            dq, dk, dv = partial.backward(query, key, value, out, lse, out_gradient, **mask)
            return dq, (dk, dv)

        def turn(carry, step, more=True):
            keys, dq, dkeys = carry
            # The gradient of the keys that are here, as far as the devices behind have summed it.
            following, dkeys = ring.shift(keys) if more else keys, ring.shift(dkeys)
            here = part(keys, step)
            dq, dkeys = jax.tree.map(jnp.add, (dq, dkeys), here)
            return (following, dq, dkeys), None

        keys = (key, value, segments)
        following = ring.shift(keys) if ring.steps > 1 else keys
        dq, dkeys = part(keys, 0)
        if ring.steps > 1:
            carry, _ = jax.lax.scan(turn, (following, dq, dkeys), jnp.arange(1, ring.steps - 1))
            (_, dq, dkeys), _ = turn(carry, ring.steps - 1, more=False)
            dkeys = ring.shift(dkeys, 1 - ring.steps)  # home
        return dq.astype(query.dtype), dkeys[0].astype(key.dtype), dkeys[1].astype(value.dtype)

    inputs = (ring.queries, ring.keys, ring.keys, ring.rows, PartitionSpec())
    in_specs = (*inputs, ring.queries, PartitionSpec(*ring.queries[:3]), ring.queries)
    return *manual(body, in_specs, (ring.queries, ring.keys, ring.keys))(*saved, out_gradient), None, None


_attend.defvjp(_forward, _backward)
