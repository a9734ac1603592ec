"""Serving: generation with a key/value cache.

Names are imported when they are used: the scheduler's half (`ml.serve.scheduling`) runs where there is no JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ml.serve.cached_attention import PagedAttention, empty_cache
    from ml.serve.completion import Completion
    from ml.serve.engine import Engine
    from ml.serve.engine_config import EngineConfig
    from ml.serve.grammar import Grammars, StructuredOutput
    from ml.serve.placement import serving_mesh
    from ml.serve.replicated import make_engine
    from ml.serve.sampling import SamplingParams
    from ml.serve.text.served_model import ServedModel
    from ml.serve.text.stop_strings import StoppableText
    from ml.serve.text.text_stream import TextStream

_HOME = {
    "Completion": "completion",
    "Engine": "engine",
    "EngineConfig": "engine_config",
    "Grammars": "grammar",
    "PagedAttention": "cached_attention",
    "SamplingParams": "sampling",
    "ServedModel": "text.served_model",
    "StoppableText": "text.stop_strings",
    "StructuredOutput": "grammar",
    "TextStream": "text.text_stream",
    "empty_cache": "cached_attention",
    "make_engine": "replicated",
    "serving_mesh": "placement",
}

__all__ = [
    "Completion",
    "Engine",
    "EngineConfig",
    "Grammars",
    "PagedAttention",
    "SamplingParams",
    "ServedModel",
    "StoppableText",
    "StructuredOutput",
    "TextStream",
    "empty_cache",
    "make_engine",
    "serving_mesh",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
