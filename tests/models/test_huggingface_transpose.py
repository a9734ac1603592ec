"""The tiled copy against plain assignment: every memory order, odd sizes, every pair of dtypes."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from ml.models.huggingface import transpose

DTYPES = [np.dtype(name) for name in ("float64", "float32", "float16")] + [np.dtype(ml_dtypes.bfloat16)]


@pytest.mark.parametrize(("source_dtype", "target_dtype"), list(itertools.product(DTYPES, DTYPES)), ids=str)
@pytest.mark.parametrize("shape", [(5,), (130, 67), (64, 128), (3, 70, 65)])
@pytest.mark.parametrize("flip", ["neither", "source", "target", "both"])
def test_copy_is_assignment(shape, flip, source_dtype, target_dtype):
    draw = np.random.default_rng(0).normal(size=shape).astype(source_dtype)
    draw.reshape(-1)[:3] = [np.inf, -0.0, 1e-3]
    source = np.ascontiguousarray(draw.T).T if flip in ("source", "both") else draw
    target = np.empty(shape[::-1], target_dtype).T if flip in ("target", "both") else np.empty(shape, target_dtype)
    transpose.copy(target, source)
    np.testing.assert_array_equal(target, draw.astype(target_dtype))
