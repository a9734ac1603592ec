"""Mixture-of-experts MLP: top-k routing, no capacity limit, one grouped matmul per projection."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from ml.models.config import MoEConfig, TransformerConfig
from ml.models.layers import activation, residual_stddev
from ml.models.parameters import Placement, unplaced, weight
from ml.weights import dot, ragged_dot


class MoE(nn.Module):
    """Routes every token to ``top_k`` experts and sums their outputs, weighted by the router's probabilities.

    On a mesh each shard of the batch routes its own tokens against the whole set of experts; the balancing loss is
    computed over the global microbatch.
    """

    config: TransformerConfig
    place: Placement = unplaced

    @nn.compact
    def __call__(self, x: Float[Array, "batch length embed"]) -> tuple[Float[Array, "batch length embed"], jax.Array]:
        """Returns the output and the unweighted load-balancing loss of this layer (a scalar, 1 when balanced)."""
        c, moe = self.config, self.config.moe
        assert moe is not None
        experts, narrow, wide = moe.num_experts, c.embed_dim, moe.mlp_dim
        init = nn.initializers.normal(c.init_stddev)
        weights = {
            "router": _Kernel(init, (narrow, experts), ("embed", "expert_logits"), name="router")(),
            "gate": _Kernel(init, (experts, narrow, wide), ("expert", "embed", "mlp"), name="gate")(),
            "up": _Kernel(init, (experts, narrow, wide), ("expert", "embed", "mlp"), name="up")(),
            "down": _Kernel(
                nn.initializers.normal(residual_stddev(c)),
                (experts, wide, narrow),
                ("expert", "mlp", "embed"),
                name="down",
            )(),
        }
        if jax.sharding.get_abstract_mesh().empty:
            return _moe(c, x, weights, batch_axes=())
        # Sorting tokens by expert is local to a shard of the batch: gather the (possibly sharded) experts, then map.
        placement = self.place("batch", None, None) or PartitionSpec(None, None, None)
        weights = jax.tree.map(lambda w: jax.reshard(w, PartitionSpec()), weights)
        axes = placement[0] if isinstance(placement[0], tuple) else (placement[0],)
        return jax.shard_map(
            lambda x, weights: _moe(c, x, weights, batch_axes=tuple(axis for axis in axes if axis)),
            in_specs=(placement, PartitionSpec()),
            out_specs=(placement, PartitionSpec()),
        )(x, weights)


class _Kernel(nn.Module):
    """A kernel in a scope of its own, so that its path ends like every other's: ``NAME/kernel``."""

    initializer: Any
    shape: tuple[int, ...]
    axes: tuple[str, ...]

    @nn.compact
    def __call__(self) -> Any:
        return weight(self, "kernel", self.initializer, self.shape, self.axes)


def route(
    logits: Float[Array, "tokens experts"], moe: MoEConfig
) -> tuple[Float[Array, "tokens k"], Int[Array, "tokens k"], Float[Array, "tokens experts"]]:
    """Chooses experts: weights and indices of the ``top_k``, and the full router probabilities, all float32."""
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    top, chosen = jax.lax.top_k(probabilities, moe.top_k)
    if moe.normalize_top_k:
        top = top / top.sum(axis=-1, keepdims=True)
    return top, chosen, probabilities


def _moe(config: TransformerConfig, x: jax.Array, weights: dict[str, Any], batch_axes: tuple[str, ...]):
    """The layer on one shard of the batch; ``batch_axes`` are the mesh axes over which the loss is averaged."""
    moe = config.moe
    assert moe is not None
    batch, length, embed = x.shape
    tokens = x.reshape(batch * length, embed)
    # Routing in float32: a bf16 logit can flip which expert wins.
    logits = dot("te,en->tn", tokens.astype(jnp.float32), weights["router"])
    top, chosen, probabilities = route(logits, moe)

    order = jnp.argsort(chosen.reshape(-1), stable=True)  # (token, choice) pairs, grouped by expert
    counts = jnp.zeros(moe.num_experts, jnp.int32).at[chosen.reshape(-1)].add(1)
    rows = tokens[order // moe.top_k]
    hidden = activation(config)(ragged_dot(rows, counts, weights["gate"])) * ragged_dot(rows, counts, weights["up"])
    out = ragged_dot(hidden, counts, weights["down"])
    out = out * top.reshape(-1)[order][:, None].astype(out.dtype)
    combined = jnp.zeros_like(tokens).at[order // moe.top_k].add(out)

    share = counts.astype(jnp.float32) / (batch * length * moe.top_k)
    mean_probability = probabilities.mean(axis=0)
    if batch_axes:
        share, mean_probability = jax.lax.pmean((share, mean_probability), batch_axes)
    # Switch Transformer (Fedus et al. 2021), eq. 4; counts carry no gradient.
    balance = moe.num_experts * jnp.sum(jax.lax.stop_gradient(share) * mean_probability)
    return combined.reshape(x.shape), balance
