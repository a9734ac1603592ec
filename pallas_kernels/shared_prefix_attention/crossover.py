"""When sharing a prefix pays: a small cost model, fitted once per device to what it measures, and kept in a file."""

import dataclasses
import functools
import itertools
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from pallas_kernels.platform import cache_folder, platform

# Predicted gains below this share of the unshared time are not trusted.
MARGIN = 0.05


@dataclasses.dataclass(frozen=True)
class Crossover:
    """Seconds that an attention call takes, as linear functions of the work in it.

    Unshared, a row costs ``own`` for each of its tokens. Shared, a node costs ``token`` for each of its tokens and
    ``pair`` for each (row, token); and a call with any node at all costs ``fixed``, and ``row`` per row for merging.

    Attributes:
      own, token, pair, row, fixed: seconds.
    """

    own: float
    token: float
    pair: float
    row: float
    fixed: float

    @classmethod
    def always(cls) -> "Crossover":
        """Shares whatever is common: for tests, and for counting bytes."""
        return cls(own=1.0, token=0.0, pair=0.0, row=0.0, fixed=0.0)

    def worth(self, rows: int, tokens: int) -> bool:
        """Whether a node gains anything, the costs of the whole call apart."""
        return self.gain(rows, tokens) > 0

    def gain(self, rows: int, tokens: int) -> float:
        """Seconds that a node of ``rows`` rows and ``tokens`` tokens saves, the costs of the whole call apart."""
        return tokens * (rows * (self.own - self.pair) - self.token)

    def pays(self, nodes: Iterable[tuple[int, int]], rows: int, tokens: int) -> bool:
        """Whether the nodes ``(rows, tokens)`` pay for a call of ``rows`` rows, which see ``tokens`` altogether."""
        gain = sum(self.gain(*node) for node in nodes)
        return gain > self.fixed + self.row * rows + MARGIN * self.own * tokens


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What a calibration holds for.

    Attributes:
      heads, kv_heads, head_dim, page_size: of the model and its cache, on one device.
      dtype: of the query.
      cache_dtype: of the cache.
      implementation: resolved: ``xla``, ``cpu``, ``gpu`` or ``tpu``.
    """

    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    dtype: str
    cache_dtype: str
    implementation: str


def crossover(shapes: Shapes, *, path: pathlib.Path | None = None, grid: Any = None) -> Crossover:
    """The crossover of this machine's first device: from the file, or else measured now (some seconds) and kept there.

    Args:
      shapes: of the calls.
      path: the file; ``None``: ``crossover.json`` in `pallas_kernels.platform.cache_folder`.
      grid: pairs ``(rows, tokens)`` to measure.
    """
    path = cache_folder() / "crossover.json" if path is None else path
    device = jax.devices()[0].device_kind
    key = json.dumps({"device": device, "jax": jax.__version__, **dataclasses.asdict(shapes)}, sort_keys=True)
    known = _read(path)
    if key in known:
        return Crossover(**known[key])
    measured = calibrate(shapes, **({} if grid is None else {"grid": grid}))
    logging.info("shared_prefix_attention: measured the crossover of %s: %s; kept in %s", device, measured, path)
    _keep(path, {**_read(path), key: dataclasses.asdict(measured)})
    return measured


GRID = tuple(itertools.product((4, 16, 64), (256, 1024)))


def calibrate(shapes: Shapes, *, grid: Iterable[tuple[int, int]] = GRID, repeats: int = 5) -> Crossover:
    """Measures unshared and shared calls, interleaved, and fits the model to their medians.

    Args:
      shapes: of the calls.
      grid: pairs ``(rows, tokens)``: that many rows share so many tokens, each with a page of its own behind them.
      repeats: measurements of each, of which the median counts.

    Raises:
      ValueError: the implementation is interpreted here, so that its time (minutes) would say nothing.
    """
    if shapes.implementation in ("gpu", "tpu") and shapes.implementation != platform():
        raise ValueError(
            f"implementation={shapes.implementation!r} is interpreted on {platform()}, so there is no crossover to "
            "measure; share with Crossover.always(), or take implementation='xla'"
        )
    cases = [(rows, tokens, *_programs(shapes, rows, tokens)) for rows, tokens in grid]
    times: dict[tuple[int, int, bool], list[float]] = {}
    for _ in range(repeats):
        for rows, tokens, unshared, shared in cases:
            times.setdefault((rows, tokens, False), []).append(unshared())
            times.setdefault((rows, tokens, True), []).append(shared())
    median = {case: float(np.median(x)) for case, x in times.items()}
    grid = [(rows, tokens) for rows, tokens, *_ in cases]
    own, _ = _fit([((rows * tokens, 1.0), median[rows, tokens, False]) for rows, tokens in grid])
    # What a shared call costs more than an unshared one of the rows' own tokens alone.
    samples = [
        ((tokens, rows * tokens, rows, 1.0), median[rows, tokens, True] - own * rows * shapes.page_size)
        for rows, tokens in grid
    ]
    token, pair, row, fixed = _fit(samples)
    return Crossover(own=own, token=token, pair=pair, row=row, fixed=fixed)


def _fit(samples: Sequence[tuple[tuple[float, ...], float]]) -> list[float]:
    """Least squares of relative errors, no coefficient below 0: the most negative becomes 0, the rest are refitted."""
    x, y = np.array([features for features, _ in samples]), np.maximum([seconds for _, seconds in samples], 1e-9)
    x, ones = x / y[:, None], np.ones(len(y))
    free = list(range(x.shape[1]))
    while True:
        scale = np.abs(x[:, free]).max(axis=0)
        coefficients = np.linalg.lstsq(x[:, free] / scale, ones, rcond=None)[0] / scale
        if (coefficients >= 0).all() or len(free) == 1:
            found = dict(zip(free, np.maximum(coefficients, 0.0).tolist(), strict=True))
            return [found.get(i, 0.0) for i in range(x.shape[1])]
        free.pop(int(coefficients.argmin()))


def _programs(shapes: Shapes, rows: int, tokens: int) -> tuple[Callable[[], float], Callable[[], float]]:
    """Two functions that run an unshared and a shared call and return the seconds it took."""
    # The package's public functions, which import this module.
    from pallas_kernels.paged_attention import PagedCache, paged_attention
    from pallas_kernels.shared_prefix_attention import make_plan, shared_prefix_attention

    page = shapes.page_size
    shared_pages = -(-tokens // page)
    pages = shared_pages + rows
    rng = np.random.default_rng(0)
    shuffled = rng.permutation(pages).astype(np.int32)
    table: Any = np.concatenate([np.tile(shuffled[:shared_pages], (rows, 1)), shuffled[shared_pages:, None]], axis=1)
    lengths: Any = np.full(rows, pages - rows + 1, np.int32) * page
    plan = make_plan(table, lengths, page_size=page, crossover=Crossover.always())
    cache = PagedCache.zeros(1, pages, page, shapes.kv_heads, shapes.head_dim, shapes.cache_dtype)
    fill = jnp.asarray(rng.normal(size=cache.key.shape[-3:]).astype(np.float32))
    cache = dataclasses.replace(cache, key=cache.key + fill.astype(cache.key.dtype), value=cache.value + 1)
    if cache.key_scale is not None:
        scale = jnp.full_like(cache.key_scale, 0.1)
        cache = dataclasses.replace(cache, key_scale=scale, value_scale=scale)
    query = jnp.asarray(rng.normal(size=(rows, shapes.heads, shapes.head_dim)), shapes.dtype)
    options: dict[str, Any] = {"implementation": shapes.implementation}

    def unshared(query, cache):
        return paged_attention(query, cache, 0, table, lengths, **options)

    def shared(query, cache):
        return shared_prefix_attention(query, cache, 0, table, lengths, plan, **options)

    def timed(attend: Callable[..., jax.Array]) -> Callable[[], float]:
        # Each call waits for the one before it, and none costs a dispatch.
        program = jax.jit(
            lambda query, cache: jax.lax.fori_loop(0, _CALLS, lambda _, q: q + 1e-3 * attend(q, cache), query)
        )
        jax.block_until_ready(program(query, cache))
        return functools.partial(_seconds, program, query, cache)

    return timed(unshared), timed(shared)


_CALLS = 4


def _seconds(program: Callable[..., jax.Array], *operands: Any) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(program(*operands))
    return (time.perf_counter() - begin) / _CALLS


def _read(path: pathlib.Path) -> dict[str, Any]:
    """What is known; a file that cannot be read is worth no more than none, since it can be measured again."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logging.warning("%s cannot be read (%s); the crossover is measured again", path, error)
        return {}


def _keep(path: pathlib.Path, known: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(known, file, indent=1, sort_keys=True)
    os.replace(file.name, path)
