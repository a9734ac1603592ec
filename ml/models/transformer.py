"""The decoder-only transformer: embedding, scanned blocks, unembedding."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, PyTree

from ml.models import rope
from ml.models.attention import AttentionLayer, AttentionStrategy, SelfAttention
from ml.models.config import RopeConfig, TransformerConfig
from ml.models.layers import MLP, Attention, Projection, block_norm
from ml.models.moe import MoE, MoEStats
from ml.models.parameters import LogicalAxes, Placement, placed, unplaced, weight
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
        self.embed = _Table(c.vocab_size, c, "vocab")
        if c.position_embedding == "learned":
            self.position = _Table(c.max_length, c, "position")
        block = Block
        if self.remat != "none":
            block = nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)  # type: ignore[assignment]
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            check_constancy_invariants=False,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, self.place)
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


class _Table(nn.Module):
    """An embedding table."""

    rows: int
    config: TransformerConfig
    axis: str

    @nn.compact
    def __call__(self) -> Any:
        init = nn.initializers.normal(self.config.init_stddev)
        return weight(self, "embedding", init, (self.rows, self.config.embed_dim), (self.axis, "embed"))


def init_params(model: Transformer, key: jax.Array) -> PyTree:
    """Random float32 parameters, unboxed. Jit it with ``out_shardings`` to create shards only."""
    return nn.meta.unbox(_init(model, key))


def logical_axes(config: TransformerConfig) -> PyTree[tuple[str, ...]]:
    """The logical axis names of every parameter: a tree like ``params`` whose leaves are tuples of names."""
    boxed = jax.eval_shape(lambda: _init(Transformer(config), jax.random.key(0)))
    return jax.tree.map(lambda box: box.names, boxed, is_leaf=lambda x: isinstance(x, LogicalAxes))


def head_params(config: TransformerConfig, params: dict[str, Any]) -> dict[str, Any]:
    """The part of ``params`` that `Transformer.logits` reads."""
    name = "embed" if config.tie_embeddings else "unembed"
    return {name: params[name]}


def _init(model: Transformer, key: jax.Array) -> PyTree:
    # Off any mesh and at length 1: shapes of parameters do not depend on the input.
    bare = model.clone(place=unplaced)
    tokens = jnp.zeros((1, 1), jnp.int32)
    return bare.init(key, tokens, SelfAttention(implementation="xla"), method="forward")["params"]


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
