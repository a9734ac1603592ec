"""From files to global batches: sources, tokenizer, packing, mixtures, resumable loaders."""

from ml.data.config import DataConfig, LabelledConfig, MaskedConfig, SourceConfig, TokenizerConfig
from ml.data.pipeline import HeldoutBatches, Loader, heldout_batches, make_loader, padding
from ml.data.prepare import Prepared, PreparedSource, prepare
from ml.data.tokenizer import Tokenizer, check_vocab

__all__ = [
    "DataConfig",
    "HeldoutBatches",
    "LabelledConfig",
    "Loader",
    "MaskedConfig",
    "Prepared",
    "PreparedSource",
    "SourceConfig",
    "Tokenizer",
    "TokenizerConfig",
    "check_vocab",
    "heldout_batches",
    "make_loader",
    "padding",
    "prepare",
]
