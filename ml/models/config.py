"""The architecture of a transformer, as data: every supported family is a setting of these fields."""

import dataclasses
from typing import Literal, get_args


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021) and its long-context rescalings.

    Attributes:
      theta: base of the geometric frequency ladder.
      scaling: ``none``; ``linear`` (positions divided by ``factor``); ``llama3`` (long wavelengths divided by
        ``factor``, short ones kept, smooth between); ``yarn`` (Peng et al. 2023: a ramp between kept and divided
        frequencies, and a temperature on the attention logits).
      factor: how much longer the context becomes.
      original_length: context length before rescaling (``llama3`` and ``yarn``).
      low_freq_factor, high_freq_factor: ``llama3``'s band edges, in wavelengths per original context.
      beta_fast, beta_slow: ``yarn``'s band edges, in rotations per original context.
      attention_factor: ``yarn``'s multiplier on the rotated vectors; ``None`` means ``0.1 ln(factor) + 1``.
      truncate: ``yarn``: round the band edges to whole dimensions.
    """

    theta: float = 10_000.0
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    original_length: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """A mixture-of-experts MLP: each token goes to its ``top_k`` experts, none is ever dropped.

    Attributes:
      num_experts: experts per layer.
      top_k: experts per token.
      mlp_dim: hidden width of one expert.
      normalize_top_k: renormalize the chosen router probabilities to sum to one.
      aux_loss_weight: weight of the load-balancing loss (Switch Transformer, eq. 4).
      balance_over: the tokens whose expert frequencies enter that loss. ``microbatch``: all of a microbatch, whatever
        the mesh; ``batch``: all of the optimizer step so far, over its microbatches ("Demons in the Detail", Qiu et al.
        2025), which balances the corpus rather than each sequence; ``shard``: each device's own part of a microbatch,
        averaged over devices, so the loss depends on the mesh.
      bias_update_rate: step by which a bias that only chooses experts follows their load after each optimizer step
        (DeepSeek-V3); 0: there is no bias.
      exchange: how tokens reach experts on other devices. ``ragged``: each row goes to the owner of its expert and
        comes back (TPU and GPU); ``gather``: every device of the expert axis gathers the axis' tokens, and sums are
        scattered back; ``auto``: whichever exists on the mesh's platform and moves less.
    """

    num_experts: int
    top_k: int
    mlp_dim: int
    normalize_top_k: bool = True
    aux_loss_weight: float = 0.01
    balance_over: Literal["shard", "microbatch", "batch"] = "microbatch"
    bias_update_rate: float = 0.0
    exchange: Literal["auto", "ragged", "gather"] = "auto"

    def __post_init__(self):
        if self.bias_update_rate < 0:
            raise ValueError(f"moe.bias_update_rate={self.bias_update_rate} must not be negative; 0 means no bias")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"moe.top_k={self.top_k} must lie between 1 and num_experts={self.num_experts}")


Pooling = Literal["first", "mean"]


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """What makes a transformer a bidirectional encoder with BERT's embeddings and heads (Devlin et al. 2019).

    Attributes:
      token_types: kinds of segment (first or second sentence), each with an embedding.
      num_classes: outputs of a classifier, which stands in the place of the two heads of pre-training (masked tokens,
        next sentence); 0: pre-training.
      pooling: what the classifier reads: ``first``, the first token through a layer of its own (BERT), or ``mean``, the
        mean of the row's tokens.
    """

    token_types: int = 2
    num_classes: int = 0
    pooling: Pooling = "first"

    def __post_init__(self):
        if self.pooling not in get_args(Pooling):
            raise ValueError(f"pooling={self.pooling!r} is none of {', '.join(get_args(Pooling))}")
        if self.pooling != "first" and not self.num_classes:
            raise ValueError(f"pooling={self.pooling!r} is for classifiers: set num_classes, or pooling='first'")
        if self.token_types < 1 or self.num_classes < 0:
            raise ValueError(f"need token_types={self.token_types} >= 1 and num_classes={self.num_classes} >= 0")


# What `ml.models.bert` has, and no other way.
_OF_ENCODERS = {
    "norm": "layer",
    "position_embedding": "learned",
    "gated_mlp": False,
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
    "tie_embeddings": True,
    "norm_offset": False,
    "post_norms": False,
    "parallel_block": False,
    "scale_embedding": False,
    "qk_norm": False,
    "sliding_window": None,
    "final_softcap": None,
    "moe": None,
}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """A decoder-only transformer, or with ``encoder`` a bidirectional one (`ml.models.bert`).

    Attributes:
      vocab_size: rows of the embedding.
      num_layers: blocks, scanned.
      embed_dim: width of the residual stream.
      num_heads: query heads.
      num_kv_heads: key and value heads; divides ``num_heads`` (1: multi-query, ``num_heads``: multi-head).
      head_dim: width of one head.
      mlp_dim: hidden width of the dense MLP (unused with ``moe``).
      max_length: longest sequence, in tokens.
      activation: nonlinearity of the MLP.
      gated_mlp: ``act(x W_gate) * (x W_up)`` (Llama) rather than ``act(x W_up)`` (GPT-2).
      norm: ``rms`` or ``layer`` (with bias, GPT-2).
      norm_eps: added to the variance.
      norm_offset: Gemma's convention: the stored scale is zero-centred, and one is added to it.
      post_norms: Gemma 2 and 3: a second norm on the output of attention and MLP.
      position_embedding: ``rope``, or ``learned`` absolute positions (GPT-2).
      rope: rotary settings of global layers.
      local_rope_theta: base for sliding-window layers where it differs (Gemma 3).
      sliding_window: a query sees at most this many keys, itself included; ``None``: all.
      window_pattern: which layers slide, repeated over depth (``("local", "global")``: Gemma 2); empty: every layer
        when ``sliding_window`` is set.
      attention_scale: multiplier on q.k; ``None``: ``head_dim ** -0.5``.
      attention_softcap: ``c tanh(x / c)`` on attention logits (Gemma 2).
      qk_norm: RMS norm on each query and key head (Qwen3, Gemma 3).
      qkv_bias, out_bias, mlp_bias: biases on the q/k/v, attention-output and MLP projections.
      parallel_block: ``x + attention(n(x)) + mlp(n(x))`` with one norm (MegaScale, section 3.1).
      scale_embedding: multiply embeddings by ``sqrt(embed_dim)`` (Gemma).
      tie_embeddings: the unembedding is the transposed embedding.
      final_softcap: ``c tanh(x / c)`` on output logits.
      moe: replaces the dense MLP.
      init_stddev: standard deviation of initial weights; residual outputs get ``/ sqrt(2 num_layers)`` in a decoder.
      encoder: makes it a BERT: every token sees all of its row, and norms follow the residual sum (post-LN).
    """

    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    max_length: int = 2048
    activation: Literal["silu", "gelu", "gelu_tanh", "gelu_quick"] = "silu"
    gated_mlp: bool = True
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_offset: bool = False
    post_norms: bool = False
    position_embedding: Literal["rope", "learned"] = "rope"
    rope: RopeConfig = RopeConfig()
    local_rope_theta: float | None = None
    sliding_window: int | None = None
    window_pattern: tuple[str, ...] = ()
    attention_scale: float | None = None
    attention_softcap: float | None = None
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    parallel_block: bool = False
    scale_embedding: bool = False
    tie_embeddings: bool = False
    final_softcap: float | None = None
    moe: MoEConfig | None = None
    init_stddev: float = 0.02
    encoder: EncoderConfig | None = None

    def __post_init__(self):
        if self.encoder is not None:
            for name, value in _OF_ENCODERS.items():
                if getattr(self, name) != value:
                    raise ValueError(f"{name}={getattr(self, name)!r} is not what an encoder has: {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}; "
                "each key/value head serves a whole group of query heads"
            )
        if self.head_dim % 2 and self.position_embedding == "rope":
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary embedding turns pairs")
        if self.window_pattern and self.sliding_window is None:
            raise ValueError("window_pattern is set, but sliding_window is not")
        if bad := set(self.window_pattern) - {"local", "global"}:
            raise ValueError(f"window_pattern holds {sorted(bad)}; each entry is 'local' or 'global'")

    def is_local(self, layer: int) -> bool:
        """Whether ``layer`` (0-based) attends through the sliding window."""
        if self.sliding_window is None:
            return False
        return not self.window_pattern or self.window_pattern[layer % len(self.window_pattern)] == "local"
