"""What a model costs: parameters, FLOPs and activation memory, from its configuration alone.

Derivations are per token and per layer; the tests hold them against the model itself and against XLA's own analysis.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp

from ml.errors import UserError, nearest
from ml.models.config import MoEConfig, TransformerConfig
from ml.models.moe.exchange import buffer_rows
from ml.models.transformer import REMAT_POLICIES
from pallas_kernels.flash_attention import xla
from pallas_kernels.flash_attention.intervals import Band

# float32 arrays of shape [tokens, vocab] alive at once: logits, their exponentials, their gradient.
_LOGIT_COPIES = 3


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters.

    Attributes:
      total: all.
      active: those that one token meets: all but the experts that it is not sent to.
      embedding: rows that are looked up (token and learned position tables).
    """

    total: int
    active: int
    embedding: int


@dataclasses.dataclass(frozen=True)
class ActivationMemory:
    """Predicted bytes for the activations of one microbatch.

    Attributes:
      saved: kept from the forward to the backward pass, over all layers.
      block: the working set of one layer's backward pass.
      head: logits and their gradient; never alive together with ``block``.
    """

    saved: int
    block: int
    head: int

    @property
    def total(self) -> int:
        """The peak."""
        return self.saved + max(self.block, self.head)


def parameter_count(config: TransformerConfig) -> ParameterCount:
    """Counts the parameters that `ml.models.init_params` would make."""
    c = config
    query, keys = c.num_heads * c.head_dim, 2 * c.num_kv_heads * c.head_dim
    norm = c.embed_dim * (2 if c.norm == "layer" else 1)
    layer = _attention_kernels(c) + norm * _norms(c)
    layer += (query + keys if c.qkv_bias else 0) + (c.embed_dim if c.out_bias else 0)
    layer += 2 * c.head_dim if c.qk_norm else 0
    idle = 0
    if c.moe is None:
        layer += _mlp_kernels(c)
        if c.mlp_bias:
            layer += c.mlp_dim * (2 if c.gated_mlp else 1) + c.embed_dim
    else:
        expert = 3 * c.embed_dim * c.moe.mlp_dim
        layer += c.embed_dim * c.moe.num_experts + c.moe.num_experts * expert
        layer += c.moe.num_experts if c.moe.bias_update_rate else 0
        idle = (c.moe.num_experts - c.moe.top_k) * expert
    rows = c.vocab_size + (c.max_length if c.position_embedding == "learned" else 0)
    embedding = c.embed_dim * (rows + (c.encoder.token_types if c.encoder else 0))
    unembedding = 0 if c.tie_embeddings else c.embed_dim * c.vocab_size
    # A decoder's last norm, an encoder's first.
    total = c.num_layers * layer + embedding + norm + unembedding + _encoder_heads(c)
    return ParameterCount(total, total - c.num_layers * idle, embedding)


def visible_keys(length: int, window: int | None = None) -> float:
    """Mean number of keys that a query of one causal sequence sees, itself included.

    Args:
      length: tokens in the sequence.
      window: sliding window; ``None``: all earlier tokens.
    """
    window = length if window is None else min(window, length)
    return (window * (window + 1) / 2 + (length - window) * window) / length


def forward_flops_per_token(config: TransformerConfig, length: int, predictions: int | None = None) -> float:
    """Matrix-multiply FLOPs of the forward pass for one token, a multiplication and an addition counted as two.

    Attention counts only visible keys, a mixture of experts only the experts chosen and the router. Embedding lookups,
    norms and softmaxes count as nothing, as in the published figures of MFU (Chowdhery et al. 2022, appendix B).

    Args:
      config: the architecture.
      length: tokens in one sequence; documents packed together count as one, an overestimate.
      predictions: tokens of a sequence that have logits; ``None``: all.
    """
    c = config
    if c.moe is None:
        mlp = _mlp_kernels(c)
    else:
        mlp = c.embed_dim * c.moe.num_experts + 3 * c.moe.top_k * c.embed_dim * c.moe.mlp_dim
    seen = sum(visible_keys(length, c.sliding_window if c.is_local(i) else None) for i in range(c.num_layers))
    if c.encoder:
        seen = c.num_layers * length
    attention = 2 * c.num_heads * c.head_dim * seen  # q k^T and weights v
    share = 1.0 if predictions is None else min(predictions, length) / length
    head = share * c.embed_dim * (c.vocab_size + (c.embed_dim if c.encoder else 0))
    return 2.0 * (c.num_layers * (_attention_kernels(c) + mlp) + attention + head)


def train_flops_per_token(config: TransformerConfig, length: int, predictions: int | None = None) -> float:
    """FLOPs of forward and backward for one token: three times `forward_flops_per_token`.

    Each product ``x w`` needs two of the same size in the backward pass. What rematerialization computes again is not
    counted: these are the model's FLOPs, those of MFU.
    """
    return 3.0 * forward_flops_per_token(config, length, predictions)


def activation_memory(
    config: TransformerConfig,
    *,
    batch: int,
    length: int,
    remat: str = "none",
    dtype: Any = jnp.float32,
    attention: Literal["xla", "kernel"] = "xla",
    logit_tokens: int | None = None,
    expert_degree: int = 1,
) -> ActivationMemory:
    """Predicts the bytes of activations of one microbatch, forward and backward, on one device.

    What is saved follows from what each policy lets JAX keep, and is right within 5%. The working set of a layer
    depends on how XLA orders and fuses it; dense models are right within a factor of 1.5 in all (on CPU, as tested).
    XLA's CPU expansion of grouped products multiplies the working set of a mixture of experts several times, which is
    not predicted. Gradients, parameters and optimizer state are not included.

    Args:
      config: the architecture.
      batch: sequences on the device.
      length: tokens in each.
      remat: key of `ml.models.REMAT_POLICIES`.
      dtype: of activations.
      attention: ``xla`` has blocks of scores in its working set; a fused ``kernel`` has none. Neither keeps any.
      logit_tokens: tokens whose logits are held at once; ``None``: all of them.
      expert_degree: devices over which the experts are spread; each then has buffers for the rows that all of them may
        send to it (`ml.models.moe.exchange.buffer_rows`), mostly empty.

    Raises:
      UserError: unknown policy.
    """
    if remat not in REMAT_POLICIES:
        raise UserError(f"remat={remat!r}: no such policy; {nearest(remat, REMAT_POLICIES)}")
    c, size = config, jnp.dtype(dtype).itemsize
    tokens = batch * length
    scores = _scores(c, length) if attention == "xla" else 0.0
    everything = _everything(c, size, expert_degree)
    casts = 0
    if remat == "offload":
        kept = 0.0
    elif remat == "full":
        kept = size * c.embed_dim
    elif remat == "none":
        kept = everything
        # Kernels cast to the type of activations are operands of the backward pass too.
        casts = size * _layer_kernels(c) if size < 4 else 0
    else:
        kept = size * _kernel_outputs(c) + (4 * c.moe.num_experts if c.moe else 0)
    widest = c.mlp_dim if c.moe is None else _routed_rows(c.moe, expert_degree) * c.moe.mlp_dim
    block = everything + size * widest + 4 * c.num_heads * scores
    head = 4 * _LOGIT_COPIES * c.vocab_size + 4 * size * c.embed_dim
    return ActivationMemory(
        saved=round(c.num_layers * (tokens * kept + casts)),
        block=round(tokens * block),
        head=(tokens if logit_tokens is None else logit_tokens) * head,
    )


def device_model(config: TransformerConfig, degrees: Mapping[str, int]) -> TransformerConfig:
    """The part of the model that one device computes with its tokens.

    Args:
      config: the whole model.
      degrees: mesh axis -> degree; what counts is ``tensor`` and ``stage``.

    Raises:
      UserError: the degrees do not divide the model.
    """
    tensor, stage = degrees["tensor"], degrees["stage"]
    cut = {"num_heads": tensor, "num_kv_heads": tensor, "mlp_dim": tensor, "vocab_size": tensor, "num_layers": stage}
    for name, parts in cut.items():
        if getattr(config, name) % parts:
            raise UserError(f"config.model.{name}={getattr(config, name)} cannot be cut into {parts} parts")
    changes: dict[str, Any] = {name: getattr(config, name) // parts for name, parts in cut.items()}
    if config.moe is not None:
        changes["moe"] = dataclasses.replace(config.moe, mlp_dim=config.moe.mlp_dim // tensor)
    return dataclasses.replace(config, **changes)


def _encoder_heads(c: TransformerConfig) -> int:
    """Pooler and classifier, or pooler and the two heads of pre-training."""
    if c.encoder is None:
        return 0
    dense = c.embed_dim * (c.embed_dim + 1)
    if c.encoder.num_classes:
        return (dense if c.encoder.pooling == "first" else 0) + (c.embed_dim + 1) * c.encoder.num_classes
    return 2 * dense + 2 * c.embed_dim + c.vocab_size + 2 * (c.embed_dim + 1)


def _attention_kernels(c: TransformerConfig) -> int:
    return 2 * c.embed_dim * (c.num_heads + c.num_kv_heads) * c.head_dim


def _mlp_kernels(c: TransformerConfig) -> int:
    return (3 if c.gated_mlp else 2) * c.embed_dim * c.mlp_dim


def _layer_kernels(c: TransformerConfig) -> int:
    experts = 0 if c.moe is None else 3 * c.moe.num_experts * c.embed_dim * c.moe.mlp_dim
    return _attention_kernels(c) + (experts if c.moe else _mlp_kernels(c))


def _norms(c: TransformerConfig) -> int:
    return 1 + (not c.parallel_block) + 2 * c.post_norms


def _kernel_outputs(c: TransformerConfig) -> int:
    """Values per token kept by a policy that saves products with kernels: those and the block's input.

    A product that is only added to the residual stream is not needed again, so it is not kept.
    """
    values = c.embed_dim + (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    if c.post_norms or not c.parallel_block:
        values += c.embed_dim  # attention's output: the second norm reads its sum with the input
    if c.moe is None:
        values += c.mlp_dim * (2 if c.gated_mlp else 1) + (c.embed_dim if c.post_norms else 0)
    return values


def _routed_rows(moe: MoEConfig, expert_degree: int) -> int:
    """Rows of an expert buffer for each of a device's tokens."""
    return buffer_rows(1, expert_degree, moe.num_experts, moe.top_k)


def _everything(c: TransformerConfig, size: int, expert_degree: int) -> float:
    """Bytes per token and layer of all that differentiation keeps where nothing is computed again.

    Args:
      c: the architecture.
      size: bytes of an activation.
      expert_degree: devices over which the experts are spread.
    """
    # A norm works in float32: its input, the square's derivative, its result before scaling, and two scalars.
    norm = 4.0 * (3 * c.embed_dim + 2)
    kept = norm * _norms(c) + size * c.embed_dim
    if c.moe is not None:
        kept += 4 * c.embed_dim  # the router reads its input in float32
    elif not c.parallel_block:
        kept += size * c.embed_dim
    kept += size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads) + 4 * c.num_heads  # and the log-sum-exp
    if c.qk_norm:
        kept += 4 * (3 * c.head_dim + 2) * (c.num_heads + c.num_kv_heads)
    # The nonlinearity keeps its input and inner results; then come its result and, if gated, other factor and product.
    inner = 4 if c.activation == "gelu_tanh" else 3
    if c.moe is None:
        return kept + size * c.mlp_dim * (inner + (3 if c.gated_mlp else 1))
    routed = size * _routed_rows(c.moe, expert_degree) * (c.moe.mlp_dim * (inner + 3) + 2 * c.embed_dim)
    return kept + routed + 4 * 3 * c.moe.num_experts


def _scores(c: TransformerConfig, length: int) -> float:
    """In the working set of XLA's attention, per query and head."""
    local = all(c.is_local(i) for i in range(c.num_layers))
    window = c.sliding_window if local and c.sliding_window else length
    config = xla.XlaConfig()
    band = Band(length - 1, length - 1) if c.encoder else Band(window - 1, 0)
    blocks = xla.unrolled_blocks(config, band, length, length)
    if blocks is None:
        tile_q, tile_kv = config.tiles(length, length)
        return tile_q * tile_kv / length
    return sum((stop - start) * (last - first) for (start, stop), (first, last) in blocks) / length
