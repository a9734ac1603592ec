"""Which experts a token goes to, and with what weight."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ml.models.config import MoEConfig


def route(
    logits: Float[Array, "tokens experts"], moe: MoEConfig, bias: Float[Array, " experts"] | None = None
) -> tuple[Float[Array, "tokens k"], Int[Array, "tokens k"], Float[Array, "tokens experts"]]:
    """Chooses experts: weights and indices of the ``top_k``, and the full router probabilities, all float32.

    Args:
      logits: of the router.
      moe: how many experts, and whether their weights are made to sum to one.
      bias: added to the probabilities where experts are chosen, and only there: weights stay those of the router
        (DeepSeek-V3, section 2.1.2, eq. 16). It has no gradient.
    """
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    if bias is None:
        top, chosen = jax.lax.top_k(probabilities, moe.top_k)
    else:
        _, chosen = jax.lax.top_k(jax.lax.stop_gradient(probabilities + bias.astype(jnp.float32)), moe.top_k)
        top = jnp.take_along_axis(probabilities, chosen, axis=-1)
    if moe.normalize_top_k:
        top = top / top.sum(axis=-1, keepdims=True)
    return top, chosen, probabilities


def count_choices(
    chosen: Int[Array, "tokens k"], num_experts: int, valid: jax.Array | None = None
) -> Int[Array, " experts"]:
    """How often each expert was chosen; by ``valid`` tokens only, if given (bool ``[tokens]``)."""
    one = jnp.ones_like(chosen) if valid is None else jnp.broadcast_to(valid[:, None], chosen.shape).astype(jnp.int32)
    return jnp.zeros(num_experts, jnp.int32).at[chosen.reshape(-1)].add(one.reshape(-1))
