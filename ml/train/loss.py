"""Next-token cross-entropy whose logits never exist for the whole batch at once."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 5, 6))
def chunked_loss(
    logits_of: Callable[[Any, jax.Array], jax.Array],
    head: Any,
    hidden: Float[Array, "batch length embed"],
    targets: Int[Array, "batch length"],
    mask: Float[Array, "batch length"],
    z_loss: float,
    chunk: int,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sums the loss over counted tokens, ``chunk`` positions at a time.

    The gradient with respect to ``head`` and ``hidden`` is computed chunk by chunk in the forward pass, while the
    logits exist, and only scaled in the backward pass: nothing is computed twice, and the largest array is
    ``[batch, chunk, vocab]``.

    Args:
      logits_of: ``(head, hidden) -> logits [batch, length, vocab]``.
      head: parameters of ``logits_of``, a pytree.
      hidden: the model's output.
      targets: next tokens.
      mask: weight of each target, usually 0 or 1.
      z_loss: weight of ``log(Z)^2``.
      chunk: positions at a time; 0: all.

    Returns:
      The objective (cross-entropy plus z-loss) and the cross-entropy alone, both in nats and summed over tokens. Only
      the objective has a gradient.
    """
    parts = [_sum(logits_of(head, h), t, m, z_loss) for h, t, m in _chunks(hidden, targets, mask, chunk)]
    objective, cross_entropy = jax.tree.map(lambda *leaves: sum(leaves), *parts)
    return objective, cross_entropy


def _forward(logits_of, head, hidden, targets, mask, z_loss, chunk):
    def chunk_loss(head, h, t, m):
        return _sum(logits_of(head, h), t, m, z_loss)

    totals, head_grad, hidden_grads = None, None, []
    for h, t, m in _chunks(hidden, targets, mask, chunk):
        if totals is not None:  # one chunk after another, or the logits of all of them would exist together
            h, totals, head_grad = jax.lax.optimization_barrier((h, totals, head_grad))
        objective, pullback, cross_entropy = jax.vjp(functools.partial(chunk_loss, t=t, m=m), head, h, has_aux=True)
        part_head, part_hidden = pullback(jnp.ones_like(objective))
        part = (objective, cross_entropy)
        totals = part if totals is None else jax.tree.map(jnp.add, totals, part)
        head_grad = part_head if head_grad is None else jax.tree.map(jnp.add, head_grad, part_head)
        hidden_grads.append(part_hidden)
    return totals, (head_grad, jnp.concatenate(hidden_grads, axis=1))


def _backward(logits_of, z_loss, chunk, saved, cotangents):
    head_grad, hidden_grad = saved
    scale = cotangents[0]  # of the objective; the cross-entropy is a report
    scaled = jax.tree.map(lambda g: (g * _beside(g, scale)).astype(g.dtype), (head_grad, hidden_grad))
    return (*scaled, None, None)


chunked_loss.defvjp(_forward, _backward)


def _beside(gradient, scale):
    """``scale`` as a factor of a gradient that is not yet summed over all devices, which takes only such."""
    axes = jax.typeof(gradient).sharding.spec.unreduced
    return jax.reshard(scale, PartitionSpec(reduced=axes)) if axes else scale


def _chunks(hidden, targets, mask, chunk):
    length = hidden.shape[1]
    size = chunk or length
    for start in range(0, length, size):
        part = slice(start, start + size)
        yield hidden[:, part], targets[:, part], mask[:, part]


def _sum(logits, targets, mask, z_loss):
    """Objective and cross-entropy of some positions, in nats."""
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    # A masked sum, not a gather: it fuses, its gradient is no scatter, and it works on a sharded vocabulary.
    at_target = jnp.where(jnp.arange(logits.shape[-1]) == targets[..., None], logits, 0).sum(axis=-1)
    cross_entropy = jnp.sum((log_z - at_target) * mask)
    if not z_loss:
        return cross_entropy, cross_entropy
    return cross_entropy + z_loss * jnp.sum(jnp.square(log_z) * mask), cross_entropy
