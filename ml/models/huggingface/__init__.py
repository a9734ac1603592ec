"""Hugging Face folders in and out: ``config.json`` and safetensors <-> `TransformerConfig` and the parameter tree.

Supported: Llama, Mistral, Qwen2, Qwen3, Mixtral, Qwen3-MoE, Gemma, Gemma 2, Gemma 3 (text), GPT-2, BERT and
CLIP.
"""

from ml.models.huggingface.load import load_params
from ml.models.huggingface.read_config import load_config, parse_config
from ml.models.huggingface.save import save_pretrained
from ml.models.huggingface.write_config import canonical, write_config

__all__ = ["canonical", "load_config", "load_params", "parse_config", "save_pretrained", "write_config"]
