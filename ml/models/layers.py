"""The layers of a block: projection, norm, attention, MLP."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ml.models import rope
from ml.models.attention import AttentionLayer, AttentionStrategy
from ml.models.config import TransformerConfig
from ml.models.parameters import Placement, unplaced, weight
from ml.weights import dot, materialize

_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_quick": lambda x: x * jax.nn.sigmoid(1.702 * x),  # CLIP
}


class Projection(nn.Module):
    """A linear map written as a named einsum.

    Attributes:
      spec: einsum of activations and kernel.
      shape, axes: shape and logical axes of the kernel.
      out_axes: logical axes of the result.
      bias_rank: trailing axes of the result that carry a bias; 0: no bias.
      stddev: of the initial kernel.
    """

    spec: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    out_axes: tuple[str | None, ...]
    bias_rank: int = 0
    stddev: float = 0.02
    place: Placement = unplaced

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Applies the map in ``x``'s dtype."""
        kernel = weight(self, "kernel", nn.initializers.normal(self.stddev), self.shape, self.axes)
        y = dot(self.spec, x, kernel, out_sharding=self.place(*self.out_axes))
        if self.bias_rank:
            # The kernel's own output axes, so that bias and result are sharded alike.
            shape, axes = self.shape[-self.bias_rank :], self.axes[-self.bias_rank :]
            axes = tuple("norm" if axis == "embed" else axis for axis in axes)
            bias = materialize(weight(self, "bias", nn.initializers.zeros, shape, axes))
            y = y + bias.astype(y.dtype)
        return y


class Norm(nn.Module):
    """RMS norm (Zhang & Sennrich 2019) or layer norm (Ba et al. 2016) over the last axis, computed in float32."""

    kind: str
    epsilon: float
    offset: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        """Normalizes and scales; returns ``x``'s dtype."""
        shape = (x.shape[-1],)
        initializer = nn.initializers.zeros if self.offset else nn.initializers.ones
        scale = materialize(weight(self, "scale", initializer, shape, ("norm",))).astype(jnp.float32)
        y = x.astype(jnp.float32)
        if self.kind == "layer":
            y = y - y.mean(axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + self.epsilon)
        y = y * (scale + 1.0 if self.offset else scale)
        if self.kind == "layer":
            y = y + materialize(weight(self, "bias", nn.initializers.zeros, shape, ("norm",))).astype(jnp.float32)
        return y.astype(x.dtype)


def block_norm(config: TransformerConfig, name: str | None = None) -> Norm:
    """A norm over the residual stream, of the architecture's kind."""
    return Norm(config.norm, config.norm_eps, config.norm_offset, name=name)


class Attention(nn.Module):
    """Grouped-query attention: projections and rotary embedding here, the attending itself in the strategy."""

    config: TransformerConfig
    place: Placement = unplaced

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        layer: AttentionLayer,
        strategy: AttentionStrategy,
        rotation: tuple[jax.Array, jax.Array] | None,
        state: Any,
    ) -> tuple[Float[Array, "batch length embed"], Any]:
        """Attends; ``rotation`` is the cosine and sine of this layer's rotary embedding, or ``None`` without one."""
        c = self.config

        def project(name: str, heads: int, axis: str) -> jax.Array:
            return Projection(
                "ble,ehd->blhd",
                (c.embed_dim, heads, c.head_dim),
                ("embed", axis, "head_dim"),
                ("batch", "length", axis, "head_dim"),
                bias_rank=2 if c.qkv_bias else 0,
                stddev=c.init_stddev,
                place=self.place,
                name=name,
            )(x)

        query = project("query", c.num_heads, "heads")
        key = project("key", c.num_kv_heads, "kv_heads")
        value = project("value", c.num_kv_heads, "kv_heads")
        if c.qk_norm:
            query = Norm("rms", c.norm_eps, c.norm_offset, name="query_norm")(query)
            key = Norm("rms", c.norm_eps, c.norm_offset, name="key_norm")(key)
        if rotation is not None:
            query, key = rope.rotate(query, *rotation), rope.rotate(key, *rotation)
        out, state = strategy.attend(layer, query, key, value, state)
        out = Projection(
            "blhd,hde->ble",
            (c.num_heads, c.head_dim, c.embed_dim),
            ("heads", "head_dim", "embed"),
            ("batch", "residual", None),
            bias_rank=1 if c.out_bias else 0,
            stddev=residual_stddev(c),
            place=self.place,
            name="out",
        )(out)
        return out, state


class MLP(nn.Module):
    """The dense feed-forward layer, gated (Shazeer 2020) or plain."""

    config: TransformerConfig
    place: Placement = unplaced

    @nn.compact
    def __call__(self, x: Float[Array, "batch length embed"]) -> Float[Array, "batch length embed"]:
        """Maps each token by itself."""
        c = self.config

        def widen(name: str) -> jax.Array:
            return Projection(
                "ble,em->blm",
                (c.embed_dim, c.mlp_dim),
                ("embed", "mlp"),
                ("batch", "length", "mlp"),
                bias_rank=int(c.mlp_bias),
                stddev=c.init_stddev,
                place=self.place,
                name=name,
            )(x)

        hidden = activation(c)(widen("gate")) * widen("up") if c.gated_mlp else activation(c)(widen("up"))
        return Projection(
            "blm,me->ble",
            (c.mlp_dim, c.embed_dim),
            ("mlp", "embed"),
            ("batch", "residual", None),
            bias_rank=int(c.mlp_bias),
            stddev=residual_stddev(c),
            place=self.place,
            name="down",
        )(hidden)


def activation(config: TransformerConfig) -> Any:
    """The MLP's nonlinearity."""
    return _ACTIVATIONS[config.activation]


def residual_stddev(config: TransformerConfig) -> float:
    """Initial deviation of kernels that write to the residual stream, so that its variance is flat in depth (GPT-2).

    An encoder's is flat without that: a norm follows each sum.
    """
    return config.init_stddev if config.encoder else config.init_stddev / (2 * config.num_layers) ** 0.5
