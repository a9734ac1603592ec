"""From files to global batches: sources, tokenizer, packing, mixtures, resumable loaders."""

from ml.data.config import DataConfig, SourceConfig, TokenizerConfig
from ml.data.pipeline import HeldoutBatches, Loader, heldout_batches, make_loader
from ml.data.prepare import Prepared, PreparedSource, prepare
from ml.data.tokenizer import Tokenizer, check_vocab

__all__ = [
    "DataConfig",
    "HeldoutBatches",
    "Loader",
    "Prepared",
    "PreparedSource",
    "SourceConfig",
    "Tokenizer",
    "TokenizerConfig",
    "check_vocab",
    "heldout_batches",
    "make_loader",
    "prepare",
]
