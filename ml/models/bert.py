"""BERT (Devlin et al. 2019): a bidirectional post-LN encoder; heads for masked tokens, next sentence or classes."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from ml.models.attention import AttentionLayer, AttentionStrategy, SelfAttention
from ml.models.config import EncoderConfig, TransformerConfig
from ml.models.layers import MLP, Attention, Projection, activation, block_norm
from ml.models.parameters import Placement, placed, unplaced, weight
from ml.models.transformer import Table, scanned
from ml.weights import dot, materialize, take


def bert_config(
    *,
    vocab_size: int = 30_522,
    num_layers: int = 12,
    embed_dim: int = 768,
    num_heads: int = 12,
    mlp_dim: int | None = None,
    max_length: int = 512,
    encoder: EncoderConfig = EncoderConfig(),
    **more: Any,
) -> TransformerConfig:
    """The architecture of a BERT; the defaults are BERT-base's (section 3).

    Args:
      vocab_size, num_layers, embed_dim, num_heads, max_length, more: see `TransformerConfig`.
      mlp_dim: ``None``: four times ``embed_dim``.
      encoder: token types and classes.
    """
    return TransformerConfig(
        vocab_size=vocab_size,
        num_layers=num_layers,
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=embed_dim // num_heads,
        mlp_dim=mlp_dim or 4 * embed_dim,
        max_length=max_length,
        encoder=encoder,
        **{
            "activation": "gelu",
            "norm": "layer",
            "norm_eps": 1e-12,
            "position_embedding": "learned",
            "gated_mlp": False,
            "qkv_bias": True,
            "out_bias": True,
            "mlp_bias": True,
            "tie_embeddings": True,
            **more,
        },
    )


class Dropout(nn.Module):
    """Zeroes a share of the values and scales the others up (Srivastava et al. 2014), given a key ``dropout``."""

    rate: float
    place: Placement = unplaced

    @nn.compact
    def __call__(self, x: Float[Array, "batch length embed"]) -> Float[Array, "batch length embed"]:
        """The identity in evaluation, when there is no key."""
        if not self.rate or not self.has_rng("dropout"):
            return x
        place = self.place("batch", "residual", None)
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, x.shape, out_sharding=place)
        return jnp.where(keep, x / (1 - self.rate), 0)


class EncoderBlock(nn.Module):
    """One block, in the form that `flax.linen.scan` wants: each sum with the residual stream is normed (post-LN)."""

    config: TransformerConfig
    place: Placement = unplaced
    dropout: float = 0.0

    @nn.compact
    def __call__(self, carry, index: Int[Array, ""], strategy: AttentionStrategy):
        """Carries (residual stream, attention state) through one layer."""
        c = self.config
        x, state = carry
        x = checkpoint_name(x, "residual")
        layer = AttentionLayer(index, None, c.attention_scale or c.head_dim**-0.5, c.attention_softcap)
        attended, state = Attention(c, self.place, name="attention")(x, layer, strategy, None, state)
        x = block_norm(c, "attention_norm")(x + Dropout(self.dropout, self.place)(attended))
        out = MLP(c, self.place, name="mlp")(x)
        x = block_norm(c, "mlp_norm")(x + Dropout(self.dropout, self.place)(out))
        return (x, state), None


class Bert(nn.Module):
    """The encoder and its heads; which heads there are says ``config.encoder.num_classes``.

    Attributes:
      config: the architecture; `bert_config` makes one.
      dtype: of activations; parameters stay float32.
      remat: key of `ml.models.REMAT_POLICIES`.
      place: maps logical axes of activations to mesh axes.
      dropout: of embeddings and of what blocks add to the residual stream, if ``apply`` is given the key ``dropout``;
        attention weights, which no array ever holds, have none.
    """

    config: TransformerConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    place: Placement = unplaced
    dropout: float = 0.0

    def setup(self):
        c = self.config
        assert c.encoder is not None, "a decoder-only model is `ml.models.Transformer`"
        self.embed = Table(c.vocab_size, c, "vocab")
        self.position = Table(c.max_length, c, "position")
        self.token_type = Table(c.encoder.token_types, c, "token_type")
        self.embedding_norm = block_norm(c)
        self.embedding_dropout = Dropout(self.dropout, self.place)
        self.layers = scanned(EncoderBlock, self.remat, inputs=1)(c, self.place, self.dropout)
        if c.encoder.pooling == "first":
            self.pooler = self._head("be,ef->bf", (c.embed_dim, c.embed_dim), ("embed", "features"))
        if c.encoder.num_classes:
            shape = (c.embed_dim, c.encoder.num_classes)
            self.classifier = self._head("bf,fc->bc", shape, ("embed", "classes"))
        else:
            self.mlm_dense = self._head("ble,ef->blf", (c.embed_dim, c.embed_dim), ("embed", "features"))
            self.mlm_norm = block_norm(c)
            self.mlm_output = _Bias(c.vocab_size)
            self.next_sentence = self._head("bf,fc->bc", (c.embed_dim, 2), ("embed", "classes"))

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        strategy: AttentionStrategy | None = None,
        token_types: Int[Array, "batch length"] | None = None,
        positions: Int[Array, "batch length"] | None = None,
        state: Any = None,
    ) -> tuple[Float[Array, "batch length embed"], Any]:
        """Runs all blocks.

        Args:
          tokens: token ids.
          strategy: how to attend; default: every token sees its whole row.
          token_types: which segment each token belongs to; default: the first.
          positions: index of each token; default ``0, 1, 2...``.
          state: the strategy's state.

        Returns:
          The last block's normed hidden states, for `logits` and `pooled`, and the new state.
        """
        strategy = SelfAttention(causal=False) if strategy is None else strategy
        place = self.place("batch", "residual", None)
        if positions is None:
            positions = jnp.zeros_like(tokens) + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        if token_types is None:
            token_types = jnp.zeros_like(tokens)
        x = take(tokens, self.embed(), dtype=self.dtype, out_sharding=place)
        x = x + take(positions, self.position(), dtype=self.dtype, out_sharding=place)
        x = x + take(token_types, self.token_type(), dtype=self.dtype, out_sharding=place)
        carry = (self.embedding_dropout(self.embedding_norm(x)), state)
        (x, state), _ = self.layers(carry, jnp.arange(self.config.num_layers), strategy)
        return placed(x, self.place("batch", "length", None)), state

    def logits(self, hidden: Float[Array, "batch length embed"]) -> Float[Array, "batch length vocab"]:
        """Logits of the tokens at hidden states, float32; reads only `ml.models.head_params`."""
        x = self.mlm_norm(activation(self.config)(self.mlm_dense(hidden)))
        y = dot("ble,ve->blv", x, self.embed(), out_sharding=self.place("batch", "length", "vocab"))
        return y.astype(jnp.float32) + self.mlm_output().astype(jnp.float32)

    def pooled(
        self, hidden: Float[Array, "batch length embed"], segment_ids: Int[Array, "batch length"] | None = None
    ) -> Float[Array, "batch embed"]:
        """What stands for a row as a whole, see `EncoderConfig.pooling`; 0 in ``segment_ids`` is padding."""
        assert self.config.encoder is not None
        if self.config.encoder.pooling == "first":
            return jnp.tanh(self.pooler(hidden[:, 0]))
        text = jnp.ones_like(hidden[..., 0]) if segment_ids is None else segment_ids > 0
        text = text.astype(jnp.float32)
        share = text / jnp.maximum(text.sum(axis=1, keepdims=True), 1)
        summed = jnp.einsum(
            "bl,ble->be",
            share,
            hidden,
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
            out_sharding=self.place("batch", None),
        )
        return summed.astype(hidden.dtype)

    def next_sentence_logits(self, hidden: Float[Array, "batch length embed"]) -> Float[Array, "batch 2"]:
        """Logits, float32: 0 is that the second sentence follows the first, 1 that it is a random one."""
        return self.next_sentence(self.pooled(hidden)).astype(jnp.float32)

    def class_logits(
        self, hidden: Float[Array, "batch length embed"], segment_ids: Int[Array, "batch length"] | None = None
    ) -> Float[Array, "batch classes"]:
        """Logits of the classes, float32; with ``encoder.num_classes`` only. See `pooled`."""
        return self.classifier(self.pooled(hidden, segment_ids)).astype(jnp.float32)

    def forward(self, tokens: Int[Array, "batch length"], *args: Any, **kwargs: Any) -> jax.Array:
        """`__call__`, then the tokens' `logits`, or with ``encoder.num_classes`` the classes'."""
        hidden, _ = self(tokens, *args, **kwargs)
        if self.config.encoder is not None and self.config.encoder.num_classes:
            return self.class_logits(hidden)
        if self.is_initializing():
            self.next_sentence_logits(hidden)
        return self.logits(hidden)

    def _head(self, spec: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> Projection:
        # Along the length of a row where there is one, then whole: heads are small, and norms read all of a row.
        out = ("batch", "length", None) if spec.startswith("ble") else ("batch", None)
        return Projection(spec, shape, axes, out, 1, self.config.init_stddev, self.place)


class _Bias(nn.Module):
    """One number for each token of the vocabulary."""

    vocab_size: int

    @nn.compact
    def __call__(self) -> jax.Array:
        return materialize(weight(self, "bias", nn.initializers.zeros, (self.vocab_size,), ("vocab",)))
