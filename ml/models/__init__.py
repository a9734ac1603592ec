"""Models as functional Flax modules: an architecture is data, parameters a pytree, the way to attend an argument."""

from ml.models.attention import AttentionLayer, AttentionStrategy, SelfAttention
from ml.models.bert import Bert, bert_config
from ml.models.build import (
    Model,
    ModelConfig,
    head_params,
    init_model_state,
    init_params,
    logical_axes,
    module_of,
    num_parameters,
)
from ml.models.config import EncoderConfig, MoEConfig, RopeConfig, TransformerConfig
from ml.models.resnet import ResNet
from ml.models.resnet_config import ResNetConfig, resnet_config
from ml.models.transformer import REMAT_POLICIES, Transformer
from ml.models.two_tower import TwoTower
from ml.models.two_tower_config import TwoTowerConfig, ViTConfig, text_tower

__all__ = [
    "REMAT_POLICIES",
    "AttentionLayer",
    "AttentionStrategy",
    "Bert",
    "EncoderConfig",
    "MoEConfig",
    "Model",
    "ModelConfig",
    "ResNet",
    "ResNetConfig",
    "RopeConfig",
    "SelfAttention",
    "Transformer",
    "TransformerConfig",
    "TwoTower",
    "TwoTowerConfig",
    "ViTConfig",
    "bert_config",
    "head_params",
    "init_model_state",
    "init_params",
    "logical_axes",
    "module_of",
    "num_parameters",
    "resnet_config",
    "text_tower",
]
