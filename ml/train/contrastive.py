"""Gradients of a loss over a whole batch of embeddings in the memory of a part: embed, differentiate, embed again.

A contrastive loss is no sum over pairs, so the gradient of a large batch is not the sum of its microbatches' gradients:
their losses know other negatives. But the loss sees the parameters through the embeddings alone. So the first pass
embeds one microbatch after another and keeps nothing else; the loss of all embeddings gives their gradients; the second
pass embeds each microbatch again, keeps what differentiation needs, and pulls its part back (Pham et al. 2021 (BASIC),
section 4; Gao et al. 2021 (GradCache)). The price is one more forward pass.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import PyTree

Embed = Callable[[PyTree, PyTree], PyTree]
Loss = Callable[[PyTree, PyTree, PyTree], tuple[jax.Array, PyTree]]


@dataclasses.dataclass(frozen=True)
class Embedded:
    """A loss that sees parameters through the embeddings of a whole batch.

    A row's embedding may depend on no other row (no batch norm), and a microbatch that is embedded twice must come out
    alike: what is random must follow from a key in the batch.

    Attributes:
      embed: ``(params, microbatch) -> embeddings``, a pytree of arrays ``[rows, ...]``.
      loss: ``(head, embeddings, batch) -> (objective, metrics)`` of all rows: of ``embeddings`` and of the ``batch``
        microbatches are merged as `merged` does.
      head: the part of ``params``, by name, that ``loss`` reads beside the embeddings.
    """

    embed: Embed
    loss: Loss
    head: Callable[[PyTree], dict[str, Any]]


def two_pass_value_and_grad(
    embedded: Embedded, zeros: Callable[[PyTree], PyTree] = lambda params: jax.tree.map(jnp.zeros_like, params)
) -> Callable[[PyTree, PyTree], tuple[tuple[jax.Array, PyTree], PyTree]]:
    """Returns ``(params, batch [microbatches, rows, ...]) -> ((objective, metrics), gradients)``.

    The gradient is that of the whole batch, whatever the number of microbatches; of a single one it is taken in one
    pass.

    Args:
      embedded: the loss.
      zeros: what gradients are added to, if other than zeros in the type of the parameters.
    """
    embed, loss, head = embedded.embed, embedded.loss, embedded.head

    def value_and_grad(params, batch):
        if len(jax.tree.leaves(batch)[0]) == 1:
            (microbatch, whole) = (jax.tree.map(lambda x: x[0], batch), merged(batch))
            of_params = lambda p: loss(head(p), embed(p, microbatch), whole)  # noqa: E731
            return jax.value_and_grad(of_params, has_aux=True)(params)

        _, embeddings = jax.lax.scan(lambda _, microbatch: (None, embed(params, microbatch)), None, batch)
        of_all = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        value, (of_head, of_embeddings) = of_all(head(params), merged(embeddings), merged(batch))

        def add(total, inputs):
            microbatch, cotangents = inputs
            _, pullback = jax.vjp(lambda p: embed(p, microbatch), params)
            return jax.tree.map(jnp.add, total, *pullback(cotangents)), None

        total, _ = jax.lax.scan(add, zeros(params), (batch, _split(of_embeddings, embeddings)))
        return value, total | {name: jax.tree.map(jnp.add, total[name], of_head[name]) for name in of_head}

    return value_and_grad


def merged(tree: PyTree) -> PyTree:
    """Microbatches ``[microbatches, rows, ...]`` as one batch ``[rows * microbatches, ...]``, random keys left out.

    Row by row the first of each microbatch, then the second of each: so every device keeps the rows that it has.
    """

    def merge(x: jax.Array) -> jax.Array:
        x = jnp.swapaxes(x, 0, 1)
        return _reshaped(x, (x.shape[0] * x.shape[1], *x.shape[2:]), lambda spec: (spec[0], *spec[2:]))

    return jax.tree.map(lambda x: None if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else merge(x), tree)


def _split(tree: PyTree, like: PyTree) -> PyTree:
    """The inverse of `merged`, for what has the shapes of ``like``."""

    def split(x: jax.Array, like: jax.Array) -> jax.Array:
        shape = (like.shape[1], like.shape[0], *like.shape[2:])
        return jnp.swapaxes(_reshaped(x, shape, lambda spec: (spec[0], None, *spec[1:])), 0, 1)

    return jax.tree.map(split, tree, like)


def _reshaped(x: jax.Array, shape: tuple[int, ...], place: Callable[[Any], tuple[Any, ...]]) -> jax.Array:
    """``x`` in another shape, that of its axes that is cut staying where it is."""
    sharding = jax.typeof(x).sharding
    spec = None if sharding.mesh.empty else PartitionSpec(*place(sharding.spec.partitions))
    return jax.lax.reshape(x, shape, out_sharding=spec)
