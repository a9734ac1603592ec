"""Models as functional Flax modules: an architecture is data, parameters a pytree, the way to attend an argument."""

from ml.models.attention import AttentionLayer, AttentionStrategy, SelfAttention
from ml.models.config import MoEConfig, RopeConfig, TransformerConfig
from ml.models.transformer import REMAT_POLICIES, Transformer, head_params, init_params, logical_axes

__all__ = [
    "REMAT_POLICIES",
    "AttentionLayer",
    "AttentionStrategy",
    "MoEConfig",
    "RopeConfig",
    "SelfAttention",
    "Transformer",
    "TransformerConfig",
    "head_params",
    "init_params",
    "logical_axes",
]
