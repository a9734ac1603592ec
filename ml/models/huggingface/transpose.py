"""Copying between arrays of different memory order and dtype at the speed of memory rather than of its latency."""

import ml_dtypes
import numpy as np

_TILE = 64  # rows and columns; a tile of either array stays in the first-level cache
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def copy(target: np.ndarray, source: np.ndarray) -> None:
    """``target[...] = source`` for arrays of one shape, either of which may be a transposed view.

    NumPy walks the rows of one array and so the columns of the other: each number costs a cache line. Tiles do not.
    """
    source = _cast(source, target.dtype)
    if target.dtype == _BFLOAT16:  # NumPy moves numbers of a foreign type one call at a time
        target, source = target.view(np.uint16), source.view(np.uint16)
    if target.ndim < 2 or target.flags.c_contiguous == source.flags.c_contiguous:
        target[...] = source
    elif target.ndim > 2:
        for inner, outer in zip(target, source, strict=True):
            copy(inner, outer)
    else:
        for row in range(0, target.shape[0], _TILE):
            rows = slice(row, row + _TILE)
            for column in range(0, target.shape[1], _TILE):
                columns = slice(column, column + _TILE)
                target[rows, columns] = source[rows, columns]


def _cast(source: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if source.dtype == dtype:
        return source
    if source.dtype == _BFLOAT16 and dtype == np.float32:
        return (source.view(np.uint16).astype(np.uint32) << 16).view(np.float32)  # bfloat16 is the upper half
    return source.astype(dtype)
