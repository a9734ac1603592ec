"""A text for small language models: the bytes of the standard library's source, with documents held out."""

import numpy as np
from jaxtyping import Int32

from ml.data import SourceConfig
from ml.data.sources import Source, is_heldout
from ml.errors import UserError

VOCAB_SIZE = 128
"""Bytes above 127 are clipped to it: source code is nearly all ASCII."""

_HELDOUT_FRACTION = 0.1


def byte_rows(
    rows: int, heldout_rows: int, length: int
) -> tuple[Int32[np.ndarray, "rows length+1"], Int32[np.ndarray, "heldout_rows length+1"]]:
    """Rows to train on and rows to test on, of different documents, taken in an order that is the same everywhere.

    The same interpreter gives the same rows; versions of Python differ a little, as their libraries do.

    Args:
      rows, heldout_rows: how many.
      length: targets in a row, which holds one byte more.

    Raises:
      UserError: the standard library is not that large.
    """
    wanted = {False: rows * (length + 1), True: heldout_rows * (length + 1)}
    texts: dict[bool, list[bytes]] = {False: [], True: []}
    missing = dict(wanted)
    for document in Source(SourceConfig()).documents(scattered=True):
        side = is_heldout(document.key, _HELDOUT_FRACTION)
        if missing[side] > 0:
            text = document.text.encode()
            texts[side].append(text)
            missing[side] -= len(text)
        if max(missing.values()) <= 0:
            break
    else:
        raise UserError(f"this Python's standard library is {max(missing.values()):,} bytes too short for the study")
    sides = (np.frombuffer(b"".join(texts[side]), np.uint8)[: wanted[side]] for side in (False, True))
    train, heldout = (np.minimum(side, VOCAB_SIZE - 1).astype(np.int32) for side in sides)
    return train.reshape(rows, length + 1), heldout.reshape(heldout_rows, length + 1)
