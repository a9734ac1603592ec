"""Next-token cross-entropy whose logits never exist for the whole batch at once."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from ml.weights.shards import gathered, held_axes, mesh_axes, scattered


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 5, 6, 7))
def chunked_loss(
    logits_of: Callable[[Any, jax.Array], jax.Array],
    head: Any,
    hidden: Float[Array, "batch length embed"],
    targets: Int[Array, "batch length"],
    mask: Float[Array, "batch length"],
    z_loss: float,
    chunk: int,
    count_correct: bool = False,
) -> tuple[Float[Array, ""], Any]:
    """Sums the loss over counted tokens, ``chunk`` positions at a time.

    The gradient with respect to ``head`` and ``hidden`` is computed chunk by chunk in the forward pass, while the
    logits exist, and only scaled in the backward pass: nothing is computed twice, and the largest array is
    ``[batch, chunk, vocab]``. Where the length is cut over devices, each takes its share of a chunk from its own part.

    Args:
      logits_of: ``(head, hidden) -> logits [batch, length, vocab]``.
      head: parameters of ``logits_of``, a pytree.
      hidden: the model's output.
      targets: next tokens.
      mask: weight of each target, usually 0 or 1.
      z_loss: weight of ``log(Z)^2``.
      chunk: positions at a time; 0: all.
      count_correct: also report how many targets have the largest logit.

    Returns:
      The objective (cross-entropy plus z-loss) and the cross-entropy alone, both in nats and summed over tokens; with
      ``count_correct`` the pair of the cross-entropy and that count. Only the objective has a gradient.
    """
    chunks = _Chunks(hidden, chunk)

    def add(totals: Any, start: Any, size: int) -> Any:
        h, t, m = (chunks.take(x, start, size) for x in (hidden, targets, mask))
        part = _sum(logits_of(head, h), t, m, z_loss, count_correct)
        return part if totals is None else jax.tree.map(jnp.add, totals, part)

    return chunks.fold(add)


def _forward(logits_of, head, hidden, targets, mask, z_loss, chunk, count_correct):
    chunks, whole_head = _Chunks(hidden, chunk), _gathered(head, hidden)

    def chunk_loss(head, h, t, m):
        return _sum(logits_of(head, h), t, m, z_loss, count_correct)

    def add(sums, start, size):
        h, t, m = (chunks.take(x, start, size) for x in (hidden, targets, mask))
        objective, pullback, report = jax.vjp(functools.partial(chunk_loss, t=t, m=m), whole_head, h, has_aux=True)
        head_grad, part = pullback(jnp.ones_like(objective))
        head_grad = jax.tree.map(scattered, head_grad, head)
        new = ((objective, report), head_grad)
        if sums is None:
            return new, chunks.put(jnp.zeros_like(hidden), part, start)
        return jax.tree.map(jnp.add, sums[0], new), chunks.put(sums[1], part, start)

    (totals, head_grad), hidden_grad = chunks.fold(add)
    return totals, (head_grad, hidden_grad)


def _backward(logits_of, z_loss, chunk, count_correct, saved, cotangents):
    head_grad, hidden_grad = saved
    scale = cotangents[0]  # of the objective; what stands beside it is a report
    scaled = jax.tree.map(lambda g: (g * _beside(g, scale)).astype(g.dtype), (head_grad, hidden_grad))
    return (*scaled, None, None)


chunked_loss.defvjp(_forward, _backward)


def _beside(gradient, scale):
    """``scale`` as a factor of a gradient that is not yet summed over all devices, which takes only such."""
    axes = jax.typeof(gradient).sharding.spec.unreduced
    return jax.reshard(scale, PartitionSpec(reduced=axes)) if axes else scale


class _Chunks:
    """Cuts axis 1 of arrays placed as ``hidden`` is: every shard's part of the length into pieces of its own."""

    def __init__(self, hidden: jax.Array, chunk: int):
        sharding = jax.typeof(hidden).sharding
        self.place = None if sharding.mesh.empty else sharding.spec
        self.shards = math.prod(sharding.mesh.shape[name] for entry in sharding.spec[1:2] for name in mesh_axes(entry))
        self.length = hidden.shape[1] // self.shards
        self.size = min(max(1, chunk // self.shards), self.length) if chunk else self.length

    def fold(self, add: Callable[[Any, Any, int], Any]) -> Any:
        """Threads ``add(sums, start, size) -> sums`` through all chunks, beginning with ``None`` and the odd one."""
        rest = (self.length - 1) // self.size
        first = self.length - rest * self.size
        sums = add(None, 0, first)
        if not rest:
            return sums
        starts = first + self.size * jnp.arange(rest)
        return jax.lax.scan(lambda sums, start: (add(sums, start, self.size), None), sums, starts)[0]

    def take(self, x: jax.Array, start: Any, size: int) -> jax.Array:
        """The chunk ``[batch, shards * size, ...]`` of ``x [batch, length, ...]``."""
        part = jax.lax.dynamic_slice_in_dim(self._by_shard(x), start, size, axis=2)
        return self._whole(part)

    def put(self, x: jax.Array, part: jax.Array, start: Any) -> jax.Array:
        """``x`` with a chunk replaced."""
        return self._whole(jax.lax.dynamic_update_slice_in_dim(self._by_shard(x), self._by_shard(part), start, axis=2))

    def _by_shard(self, x: jax.Array) -> jax.Array:
        """As ``[batch, shards, part, ...]``, which moves nothing."""
        place = self._spec(x.ndim)
        x = x if place is None else jax.reshard(x, place)
        shape = (x.shape[0], self.shards, x.shape[1] // self.shards, *x.shape[2:])
        place = None if place is None else PartitionSpec(*place[:2], None, *place[2:])
        return jax.lax.reshape(x, shape, out_sharding=place)

    def _whole(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])
        return jax.lax.reshape(x, shape, out_sharding=self._spec(x.ndim - 1))

    def _spec(self, rank: int) -> PartitionSpec | None:
        return None if self.place is None else PartitionSpec(*self.place[:rank])


def _gathered(head: Any, hidden: jax.Array) -> Any:
    """The plain arrays of ``head`` as a product with ``hidden`` reads them, gathered once and not chunk by chunk."""
    sharding = jax.typeof(hidden).sharding
    tokens = frozenset(axis for entry in sharding.spec[:2] for axis in mesh_axes(entry))

    def gather(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or not tokens & held_axes(leaf):
            return leaf
        return gathered(leaf.astype(hidden.dtype), tokens)

    return jax.tree.map(gather, head, is_leaf=lambda node: not isinstance(node, dict))


def _sum(logits, targets, mask, z_loss, count_correct):
    """Objective and cross-entropy of some positions, in nats; see `chunked_loss`."""
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    # A masked sum, not a gather: it fuses, its gradient is no scatter, and it works on a sharded vocabulary.
    at_target = jnp.where(jnp.arange(logits.shape[-1]) == targets[..., None], logits, 0).sum(axis=-1)
    cross_entropy = jnp.sum((log_z - at_target) * mask)
    objective = cross_entropy + z_loss * jnp.sum(jnp.square(log_z) * mask) if z_loss else cross_entropy
    if not count_correct:
        return objective, cross_entropy
    return objective, (cross_entropy, jnp.sum((at_target >= logits.max(axis=-1)) * mask))
