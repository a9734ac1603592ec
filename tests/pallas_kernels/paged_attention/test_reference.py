"""The reference against a transcription of the definition in float64, row by row."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import PagedCache, paged_attention, quantize
from pallas_kernels.paged_attention.core import attend_in_order, attend_segments, finish
from pallas_kernels.paged_attention.segments import Segments

PAGE, HEADS, KV_HEADS, DIM = 16, 4, 2, 8
SEQUENCES = ([5, 0, 3], [1, 6, 2], [4, 7, 8])  # pages of each sequence
LENGTHS = [40, 17, 0]


def make(seed=0, dtype="float32"):
    rng = np.random.default_rng(seed)
    shape = (2, 9, PAGE, KV_HEADS, DIM)
    key, value = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    if dtype == "float32":
        return rng, PagedCache(key, value), np.asarray(key, np.float64)[1], np.asarray(value, np.float64)[1]
    (key, key_scale), (value, value_scale) = (quantize(x, dtype) for x in (key, value))
    meant = [
        np.asarray(x, np.float64)[1] * np.asarray(s, np.float64)[1][..., None]
        for x, s in ((key, key_scale), (value, value_scale))
    ]
    return rng, PagedCache(key, value, key_scale.swapaxes(2, 3), value_scale.swapaxes(2, 3)), *meant


def row(query, key, value, pages, position, *, begin=0, end=None, window=None, scale=None, softcap=None):
    """Output and log-sum-exp of one query row, ``[heads, head_dim]`` and ``[heads]``, by the definition."""
    out, lse = np.zeros((HEADS, DIM)), np.full(HEADS, -np.inf)
    stop = position + 1 if end is None else min(end, position + 1)
    seen = [j for j in range(begin, stop) if window is None or j > position - window]
    for head in range(HEADS if seen else 0):
        group = head // (HEADS // KV_HEADS)
        keys = np.stack([key[pages[j // PAGE], j % PAGE, group] for j in seen])
        values = np.stack([value[pages[j // PAGE], j % PAGE, group] for j in seen])
        logits = keys @ query[head].astype(np.float64) * (DIM**-0.5 if scale is None else scale)
        logits = logits if softcap is None else softcap * np.tanh(logits / softcap)
        weights = np.exp(logits - logits.max())
        out[head] = weights @ values / weights.sum()
        lse[head] = logits.max() + np.log(weights.sum())
    return out, lse


def check(found, expected):
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(x), np.stack(y), atol=3e-6, rtol=3e-6)


CASES = {
    "plain": {},
    "window": {"window": 3},
    "wide window": {"window": 30},
    "softcap and scale": {"softcap": 1.5, "scale": 0.7},
}


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("name", CASES)
def test_decode(name, dtype, invariant):
    rng, cache, key, value = make(dtype=dtype)
    query = rng.normal(size=(3, HEADS, DIM)).astype(np.float32)
    found = paged_attention(
        query, cache, 1, jnp.asarray(SEQUENCES, jnp.int32), jnp.asarray(LENGTHS, jnp.int32),
        return_lse=True, implementation="reference", invariant=invariant, **CASES[name],
    )  # fmt: skip
    rows = [row(q, key, value, p, n - 1, **CASES[name]) for q, p, n in zip(query, SEQUENCES, LENGTHS, strict=True)]
    check(found, zip(*rows, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_ragged_with_starts(name):
    rng, cache, key, value = make(1)
    counts, starts = [9, 2, 0], [16, 16, 0]
    query = rng.normal(size=(13, HEADS, DIM)).astype(np.float32)  # two rows are padding
    found = paged_attention(
        query, cache, 1, jnp.asarray(SEQUENCES, jnp.int32), jnp.asarray(LENGTHS, jnp.int32),
        jnp.asarray([0, 9, 11, 11], jnp.int32), starts=jnp.asarray(starts, jnp.int32),
        return_lse=True, implementation="reference", **CASES[name],
    )  # fmt: skip
    rows, at = [], 0
    for pages, length, count, start in zip(SEQUENCES, LENGTHS, counts, starts, strict=True):
        for position in range(length - count, length):
            rows.append(row(query[at], key, value, pages, position, begin=start, **CASES[name]))
            at += 1
    rows += [(np.zeros((HEADS, DIM)), np.full(HEADS, -np.inf))] * 2
    check(found, zip(*rows, strict=True))


@pytest.mark.parametrize("ordered", [False, True])
def test_segments(ordered):
    """Rows below a node, out of order in the output, and a run that no row sees."""
    rng, cache, key, value = make(2)
    query = rng.normal(size=(4, HEADS, DIM)).astype(np.float32)
    position = [31, 20, 39, 12]
    fields = [[0, 2, 3], [2, 1, 1], [0, 0, 1], [0, 16, 16], [32, 40, 17], [2, 0, 1]]
    segments = Segments(*(jnp.asarray(x, jnp.int32) for x in fields))
    operands = (
        jnp.asarray(query), jnp.asarray(position, jnp.int32), cache, jnp.int32(1), jnp.asarray(SEQUENCES, jnp.int32)
    )  # fmt: skip
    call = {"outputs": 4, "decode": False, "scale": DIM**-0.5, "implementation": "reference"}
    if ordered:
        found = finish(attend_in_order(*operands, segments, **call), "reference")
    else:
        found = attend_segments(*operands, segments, **call)
    of_row = [(0, 0, 32), (0, 0, 32), (0, 16, 40), (1, 16, 17)]
    rows = [
        row(query[r], key, value, SEQUENCES[s], position[r], begin=begin, end=end)
        for r, (s, begin, end) in ((2, of_row[2]), (3, of_row[3]), (0, of_row[0]), (1, of_row[1]))
    ]
    check(found, zip(*rows, strict=True))
