"""The decoder-only transformer: embedding, scanned blocks, unembedding."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from ml.errors import UserError
from ml.models import rope
from ml.models.attention import AttentionLayer, AttentionStrategy, SelfAttention
from ml.models.config import RopeConfig, TransformerConfig
from ml.models.layers import MLP, Attention, Projection, block_norm
from ml.models.moe import MoE, MoEStats
from ml.models.parameters import Placement, placed, unplaced, weight
from ml.weights import dot, take

# What the backward pass keeps of a block. Everything else is computed again.
REMAT_POLICIES = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.checkpoint_dots,
    "dots_no_batch": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["residual"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


@flax.struct.dataclass
class _PerLayer:
    """What differs from layer to layer, stacked, and sliced by the scan."""

    index: Int[Array, " layers"]
    local: Int[Array, " layers"]
    expert_counts: Int[Array, "layers experts"] | None = None


class Block(nn.Module):
    """One decoder block, in the form that `flax.linen.scan` wants: carry in, carry out."""

    config: TransformerConfig
    place: Placement = unplaced

    @nn.compact
    def __call__(self, carry, per_layer: _PerLayer, strategy: AttentionStrategy, rotations, valid=None):
        """Carries (residual stream, attention state, summed balancing loss) through one layer.

        Beside the carry it returns how often each of its experts was chosen; ``None`` without experts.
        """
        c = self.config
        x, state, balance = carry
        x = checkpoint_name(x, "residual")
        layer = AttentionLayer(
            per_layer.index, _window(c, per_layer.local), c.attention_scale or c.head_dim**-0.5, c.attention_softcap
        )
        rotation = rotations[0] if rotations else None
        if len(rotations) == 2:
            rotation = jax.tree.map(lambda a, b: jnp.where(per_layer.local, a, b), rotations[1], rotations[0])

        normed = block_norm(c, "attention_norm")(x)
        attended, state = Attention(c, self.place, name="attention")(normed, layer, strategy, rotation, state)
        if c.post_norms:
            attended = block_norm(c, "post_attention_norm")(attended)
        if not c.parallel_block:
            x = x + attended
            normed = block_norm(c, "mlp_norm")(x)
        counts = None
        if c.moe is None:
            out = MLP(c, self.place, name="mlp")(normed)
        else:
            out, stats = MoE(c, self.place, name="moe")(normed, valid, per_layer.expert_counts)
            balance, counts = balance + stats.balance, stats.counts
        if c.post_norms:
            out = block_norm(c, "post_mlp_norm")(out)
        x = x + attended + out if c.parallel_block else x + out
        return (x, state, balance), counts


def scanned(block: type[nn.Module], remat: str, *, inputs: int) -> Any:
    """``block`` stacked over layers: compiled once, its parameters with a leading axis ``layers``.

    Args:
      block: called with (carry, what differs by layer, ``inputs`` values that do not); returns (carry, output).
      remat: key of `REMAT_POLICIES`.
      inputs: how many.
    """
    if remat != "none":
        block = nn.remat(block, policy=REMAT_POLICIES[remat], prevent_cse=False)  # type: ignore[assignment]
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, *[nn.broadcast] * inputs),
        check_constancy_invariants=False,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


class Transformer(nn.Module):
    """A decoder-only transformer whose way to attend is an argument.

    Attributes:
      config: the architecture.
      dtype: of activations; parameters stay float32.
      remat: key of `REMAT_POLICIES`.
      place: maps logical axes of activations to mesh axes.
    """

    config: TransformerConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    place: Placement = unplaced

    def setup(self):
        c = self.config
        if c.encoder is not None:
            raise UserError("this model is an encoder (BERT), which writes no text; give a decoder-only model")
        self.embed = Table(c.vocab_size, c, "vocab")
        if c.position_embedding == "learned":
            self.position = Table(c.max_length, c, "position")
        self.layers = scanned(Block, self.remat, inputs=3)(c, self.place)
        self.final_norm = block_norm(c)
        if not c.tie_embeddings:
            self.unembed = Projection(
                "ble,ev->blv",
                (c.embed_dim, c.vocab_size),
                ("embed", "vocab"),
                ("batch", "length", "vocab"),
                stddev=c.init_stddev,
                place=self.place,
            )

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        strategy: AttentionStrategy | None = None,
        positions: Int[Array, "batch length"] | None = None,
        state: Any = None,
        valid: Bool[Array, "batch length"] | None = None,
        expert_counts: Int[Array, "layers experts"] | None = None,
    ) -> tuple[Float[Array, "batch length embed"], Any, MoEStats]:
        """Runs all blocks.

        Args:
          tokens: token ids.
          strategy: how to attend; default: causal attention within each row.
          positions: index of each token in its document; default ``0, 1, 2...``.
          state: the strategy's state, such as a KV cache.
          valid: which tokens are more than padding, and so count in the experts' load; default: all.
          expert_counts: how often each expert was chosen in earlier microbatches of the same optimizer step, for
            ``moe.balance_over="batch"``; default: there are none.

        Returns:
          The final normed hidden states (give them to `logits`), the new state, and how the experts were used: the
          balancing loss averaged over layers, and this microbatch's counts ``[layers, experts]``.
        """
        strategy = SelfAttention() if strategy is None else strategy
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = self.embed_tokens(tokens, positions)
        x, state, stats = self.run_layers(x, strategy, positions, state, valid, expert_counts)
        return self.normalize(x), state, stats

    def embed_tokens(
        self, tokens: Int[Array, "batch length"], positions: Int[Array, "batch length"]
    ) -> Float[Array, "batch length embed"]:
        """What the first block receives; reads no layer."""
        c, place = self.config, self.place("batch", "residual", None)
        x = take(tokens, self.embed(), dtype=self.dtype, out_sharding=place)
        if c.scale_embedding:
            x = x * jnp.asarray(c.embed_dim**0.5, self.dtype)
        if c.position_embedding == "learned":
            x = x + take(positions, self.position(), dtype=self.dtype, out_sharding=place)
        return x

    def run_layers(
        self,
        x: Float[Array, "batch length embed"],
        strategy: AttentionStrategy,
        positions: Int[Array, "batch length"],
        state: Any = None,
        valid: Bool[Array, "batch length"] | None = None,
        expert_counts: Int[Array, "count experts"] | None = None,
        *,
        first: int | Int[Array, ""] = 0,
        count: int | None = None,
    ) -> tuple[Float[Array, "batch length embed"], Any, MoEStats]:
        """Runs blocks ``first .. first + count - 1`` (default: all); ``params["layers"]`` holds just these, stacked.

        Returns:
          The residual stream, the strategy's new state, and how the experts of these blocks were used: the balancing
          loss averaged over *all* the model's layers, the others' taken as 0, and counts.
        """
        c = self.config
        count = c.num_layers if count is None else count
        index = first + jnp.arange(count)
        local = jax.lax.dynamic_slice_in_dim(jnp.array([c.is_local(i) for i in range(c.num_layers)]), first, count)
        per_layer = _PerLayer(index, local, expert_counts)
        carry = (x, state, jnp.zeros((), jnp.float32))
        (x, state, balance), counts = self.layers(carry, per_layer, strategy, _rotations(c, positions), valid)
        if counts is None:
            counts = jnp.zeros((count, 0), jnp.int32)
        return x, state, MoEStats(balance / c.num_layers, counts)

    def normalize(self, x: Float[Array, "batch length embed"]) -> Float[Array, "batch length embed"]:
        """What `logits` receives, of what the last block returned."""
        return placed(self.final_norm(x), self.place("batch", "length", None))

    def logits(self, hidden: Float[Array, "batch length embed"]) -> Float[Array, "batch length vocab"]:
        """Logits, float32, of hidden states that `__call__` returned; reads only `head_params`."""
        c = self.config
        if c.tie_embeddings:
            place = self.place("batch", "length", "vocab")
            logits = dot("ble,ve->blv", hidden, self.embed(), out_sharding=place)
        else:
            logits = self.unembed(hidden)
        logits = logits.astype(jnp.float32)
        return logits if c.final_softcap is None else c.final_softcap * jnp.tanh(logits / c.final_softcap)

    def forward(self, tokens: Int[Array, "batch length"], *args: Any, **kwargs: Any) -> jax.Array:
        """`__call__`, then `logits`: ``[batch, length, vocab]``, for inputs small enough to hold that."""
        return self.logits(self(tokens, *args, **kwargs)[0])


class Table(nn.Module):
    """An embedding table of ``rows``, which are along the logical axis ``axis``."""

    rows: int
    config: TransformerConfig
    axis: str

    @nn.compact
    def __call__(self) -> Any:
        """The table itself, for `ml.weights.take` and `ml.weights.dot`."""
        init = nn.initializers.normal(self.config.init_stddev)
        return weight(self, "embedding", init, (self.rows, self.config.embed_dim), (self.axis, "embed"))


def _window(config: TransformerConfig, local: jax.Array) -> int | jax.Array | None:
    """The layer's window: static where all layers agree, so that attention may skip work."""
    if config.sliding_window is None:
        return None
    if all(config.is_local(i) for i in range(config.num_layers)):
        return config.sliding_window
    return jnp.where(local, config.sliding_window, jnp.iinfo(jnp.int32).max // 2)


def _rotations(config: TransformerConfig, positions: jax.Array) -> tuple[tuple[jax.Array, jax.Array], ...]:
    """Rotary cosine and sine: none, one for all layers, or (global, local)."""
    if config.position_embedding != "rope":
        return ()
    every = rope.rotation(positions, config.rope, config.head_dim)
    if config.local_rope_theta is None:
        return (every,)
    return every, rope.rotation(positions, RopeConfig(theta=config.local_rope_theta), config.head_dim)
