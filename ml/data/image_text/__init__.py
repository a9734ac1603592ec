"""Images with captions: where they lie, tokenized captions, and batches of both."""

from ml.data.image_text.config import ImageTextDataConfig
from ml.data.image_text.prepare import PreparedPairs, padding, prepare

__all__ = ["ImageTextDataConfig", "PreparedPairs", "padding", "prepare"]
