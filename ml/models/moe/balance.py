"""What keeps the experts' load even: the balancing loss over a shard, microbatch or batch, and the router's bias."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from ml.models.config import MoEConfig
from ml.models.moe.routing import count_choices


@flax.struct.dataclass
class MoEStats:
    """How the tokens of one microbatch were spread over the experts.

    Attributes:
      balance: the load-balancing loss, unweighted: 1 when balanced; 0 for a dense model. Of one layer, or the mean over
        layers.
      counts: how often each expert of each layer was chosen, by counted tokens; ``[layers, 0]`` for a dense model.
    """

    balance: Float[Array, ""]
    counts: Int[Array, "*layers experts"]


def switch_loss(counts: Int[Array, " experts"], probabilities: Float[Array, " experts"]) -> Float[Array, ""]:
    """``E sum_i f_i P_i`` (Switch Transformer, Fedus et al. 2021, eq. 4): 1 when balanced, ``E / k`` at worst.

    Args:
      counts: how often each expert was chosen; ``f = counts / sum(counts)``, which has no gradient.
      probabilities: mean router probability of each expert.
    """
    counts = counts.astype(jnp.float32)
    share = jax.lax.stop_gradient(counts / jnp.maximum(counts.sum(), 1))
    return counts.shape[-1] * jnp.sum(share * probabilities)


def layer_stats(
    moe: MoEConfig,
    chosen: Int[Array, "tokens k"],
    probabilities: Float[Array, "tokens experts"],
    *,
    valid: Bool[Array, " tokens"] | None,
    earlier: Int[Array, " experts"] | None,
    axes: tuple[str, ...],
) -> MoEStats:
    """The statistics of one layer, over the tokens of every device along the mesh axes ``axes``.

    With ``moe.balance_over="batch"`` the frequencies are those of all tokens of the optimizer step so far ("Demons in
    the Detail", Qiu et al. 2025, section 3: counts are accumulated over microbatches). As they have no gradient, the
    mean over microbatches of losses with one and the same ``f`` is the loss of the whole batch exactly.

    Args:
      moe: the layer.
      chosen: experts of this device's tokens.
      probabilities: of the router, for the same tokens.
      valid: which tokens count; ``None``: all.
      earlier: counts over the microbatches of this step before this one; ``None``: there are none.
      axes: manual mesh axes over which the tokens of a microbatch are spread.
    """
    counts = count_choices(chosen, moe.num_experts, valid)
    if valid is None:
        tokens = jnp.full_like(probabilities, len(chosen), shape=())
    else:
        tokens = valid.sum(dtype=jnp.float32)
        probabilities = jnp.where(valid[:, None], probabilities, 0)
    total = probabilities.sum(axis=0)
    everywhere = jax.lax.psum(counts, axes)
    if moe.balance_over == "shard":
        return MoEStats(jax.lax.pmean(switch_loss(counts, total / jnp.maximum(tokens, 1)), axes), everywhere)
    mean = jax.lax.psum(total, axes) / jnp.maximum(jax.lax.psum(tokens, axes), 1)
    accumulated = everywhere
    if moe.balance_over == "batch" and earlier is not None:
        accumulated = everywhere + earlier
    return MoEStats(switch_loss(accumulated, mean), everywhere)


def update_router_bias(params: PyTree, counts: Int[Array, "layers experts"], rate: float) -> PyTree:
    """Raises the bias of experts with less than the mean load by ``rate``, lowers that of the others (DeepSeek-V3).

    ``b += rate * sign(mean(c) - c)`` in each layer, then centred: a shift of all biases changes no choice. Call it
    after the optimizer, which must not move the bias (its gradient is zero, and it does not decay).

    Args:
      params: of a model with ``moe.bias_update_rate > 0``.
      counts: how often each expert was chosen in the whole batch.
      rate: size of a step; 0.001 in DeepSeek-V3 (section 4.2), whose affinities are sigmoids; ours are probabilities.

    Returns:
      ``params`` with other biases; everything else is shared with the argument.
    """
    load = counts.astype(jnp.float32)
    direction = jnp.sign(load.mean(axis=-1, keepdims=True) - load)
    layers: Any = params["layers"]
    moe, router = layers["moe"], layers["moe"]["router"]
    bias = router["bias"] + rate * direction
    bias = bias - bias.mean(axis=-1, keepdims=True)
    return {**params, "layers": {**layers, "moe": {**moe, "router": {**router, "bias": bias}}}}
