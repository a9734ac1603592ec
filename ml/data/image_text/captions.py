"""Texts of a two-tower model: one in a row, closed by the end-of-text token, at which the model reads it."""

from collections.abc import Sequence

import numpy as np

from ml.data.tokenizer import Tokenizer


def caption_ids(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> list[list[int]]:
    """Ids of each text, cut so that with what stands before and behind it at most ``length`` are left.

    The beginning-of-text token stands before it where that is a token of its own: transformers' CLIP reads a text at
    its *first* end-of-text token.
    """
    before = [tokenizer.bos_id] if tokenizer.bos_id != tokenizer.eos_id else []
    room = length - len(before) - 1
    return [[*before, *ids[:room], tokenizer.eos_id] for ids in tokenizer.encode_batch(texts)]


def caption_rows(captions: Sequence[Sequence[int]], length: int, padding: int) -> dict[str, np.ndarray]:
    """Captions as rows.

    Args:
      captions: ids of each, at most ``length``.
      length: of a row.
      padding: the id behind a caption.

    Returns:
      int32 ``[captions, length]``: ``tokens``; ``segment_ids``, 1 where there is text.
    """
    tokens = np.full((len(captions), length), padding, np.int32)
    segments = np.zeros_like(tokens)
    for row, ids in enumerate(captions):
        tokens[row, : len(ids)] = ids
        segments[row, : len(ids)] = 1
    return {"tokens": tokens, "segment_ids": segments}


def encode_captions(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> dict[str, np.ndarray]:
    """Both at once: texts as rows of ``length``, padded with the end-of-text token."""
    return caption_rows(caption_ids(tokenizer, texts, length), length, tokenizer.eos_id)
