"""From files to global batches: sources, tokenizer, packing, images, mixtures, resumable loaders."""

from ml.data.config import DataConfig, LabelledConfig, MaskedConfig, SourceConfig, TokenizerConfig
from ml.data.image_text import ImageTextDataConfig
from ml.data.images import CropConfig, ImageDataConfig
from ml.data.kinds import padding, prepare
from ml.data.lookahead import Lookahead, next_name
from ml.data.pipeline import HeldoutBatches, Loader, heldout_batches, make_loader
from ml.data.prepared import Prepared, PreparedSource
from ml.data.tokenizer import Tokenizer, check_vocab

__all__ = [
    "CropConfig",
    "DataConfig",
    "HeldoutBatches",
    "ImageDataConfig",
    "ImageTextDataConfig",
    "LabelledConfig",
    "Loader",
    "Lookahead",
    "MaskedConfig",
    "Prepared",
    "PreparedSource",
    "SourceConfig",
    "Tokenizer",
    "TokenizerConfig",
    "check_vocab",
    "heldout_batches",
    "make_loader",
    "next_name",
    "padding",
    "prepare",
]
