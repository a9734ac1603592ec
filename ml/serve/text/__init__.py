"""Between text and tokens: models with their tokenizers, chat templates, text as it comes, stop strings."""

from ml.serve.text.chat_template import ChatTemplate
from ml.serve.text.served_model import ServedModel
from ml.serve.text.stop_strings import StoppableText
from ml.serve.text.text_stream import TextStream

__all__ = ["ChatTemplate", "ServedModel", "StoppableText", "TextStream"]
