"""Models as functional Flax modules: an architecture is data, parameters a pytree, the way to attend an argument."""

from ml.models.attention import AttentionLayer, AttentionStrategy, SelfAttention
from ml.models.bert import Bert, bert_config
from ml.models.build import Model, head_params, init_params, logical_axes, module_of
from ml.models.config import EncoderConfig, MoEConfig, RopeConfig, TransformerConfig
from ml.models.transformer import REMAT_POLICIES, Transformer

__all__ = [
    "REMAT_POLICIES",
    "AttentionLayer",
    "AttentionStrategy",
    "Bert",
    "EncoderConfig",
    "MoEConfig",
    "Model",
    "RopeConfig",
    "SelfAttention",
    "Transformer",
    "TransformerConfig",
    "bert_config",
    "head_params",
    "init_params",
    "logical_axes",
    "module_of",
]
