"""Serving: generation with a key/value cache."""

from ml.serve.cached_attention import DecodeAttention, KVCache, PrefillAttention
from ml.serve.generation import Completion, Generator
from ml.serve.sampling import SamplingParams
from ml.serve.text_stream import TextStream

__all__ = [
    "Completion",
    "DecodeAttention",
    "Generator",
    "KVCache",
    "PrefillAttention",
    "SamplingParams",
    "TextStream",
]
