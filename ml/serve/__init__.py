"""Serving: generation with a key/value cache."""

from ml.serve.cached_attention import PagedAttention, PrefillAttention, empty_cache
from ml.serve.engine import Engine, EngineConfig
from ml.serve.generation import Completion, Generator
from ml.serve.sampling import SamplingParams
from ml.serve.text import ServedModel, StoppableText, TextStream

__all__ = [
    "Completion",
    "Engine",
    "EngineConfig",
    "Generator",
    "PagedAttention",
    "PrefillAttention",
    "SamplingParams",
    "ServedModel",
    "StoppableText",
    "TextStream",
    "empty_cache",
]
