"""Batched, cached generation: one prefill, then compiled decode steps, several to a dispatch."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from ml.errors import UserError
from ml.models import Transformer, TransformerConfig, head_params
from ml.serve.cached_attention import PagedAttention, PrefillAttention, empty_cache
from ml.serve.sampling import SamplingParams, SamplingRows, TokenLogprobs, sample
from pallas_kernels.paged_attention import PagedCache

_NOTHING = -1  # stands for "no token" in arrays of tokens
_SHORTEST_BUCKET = 16
_PAGE_SIZE = 16
# What `ml.serve.engine.Engine` does and `Generator` does not.
_ENGINE_ALONE = (
    "min_tokens",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "ignore_eos",
    "n",
    "logprobs",
)


@dataclasses.dataclass(frozen=True)
class Completion:
    """What the model wrote.

    Attributes:
      tokens: generated ids, without the stop token.
      finish_reason: ``stop`` (a stop token came), ``length`` (``max_tokens`` reached) or ``cancelled``.
      logprobs: of each token, if they were asked for.
    """

    tokens: list[int]
    finish_reason: Literal["stop", "length", "cancelled"]
    logprobs: list[TokenLogprobs] | None = None


class Generator:
    """Continues prompts with one model.

    Shapes are rounded up to powers of two (rows, prompt length, room for text), so that few programs are ever compiled.
    """

    def __init__(
        self,
        config: TransformerConfig,
        params: PyTree,
        *,
        stop_ids: Iterable[int] = (),
        dtype: Any = jnp.float32,
        max_batch: int = 8,
        steps_per_dispatch: int = 8,
    ):
        """Keeps ``params`` as they are.

        Args:
          config: the architecture.
          params: its parameters.
          stop_ids: tokens that end every text, such as the tokenizer's end of text.
          dtype: of activations and cache.
          max_batch: prompts beyond this many wait for the next batch.
          steps_per_dispatch: tokens per row between two looks of the host: the stream's granularity.
        """
        self.config = config
        self._model = Transformer(config, dtype=dtype)
        self._params = params
        self._stop_ids = tuple(stop_ids)
        self._max_batch = max_batch
        self._steps = steps_per_dispatch

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
        on_tokens: Callable[[int, list[int]], None] | None = None,
    ) -> list[Completion]:
        """Continues each prompt.

        Args:
          prompts: token ids, at least one each.
          sampling: one for all prompts, or one each.
          on_tokens: called with a prompt's index and its new tokens as they come.

        Raises:
          UserError: an empty prompt, an id outside the vocabulary, or ``prompt + max_tokens`` longer than the model.
        """
        requests = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        if len(requests) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, but {len(requests)} sampling parameters")
        for i, (prompt, request) in enumerate(zip(prompts, requests, strict=True)):
            self._check(i, prompt, request)
        completions: list[Completion] = []
        for start in range(0, len(prompts), self._max_batch):
            part = slice(start, start + self._max_batch)

            def report(row: int, tokens: list[int], start: int = start) -> None:
                if on_tokens is not None:
                    on_tokens(start + row, tokens)

            completions += self._generate_batch(prompts[part], requests[part], report)
        return completions

    def _check(self, index: int, prompt: Sequence[int], request: SamplingParams) -> None:
        for name in _ENGINE_ALONE:
            if getattr(request, name) != getattr(SamplingParams(), name):
                raise UserError(
                    f"prompt {index}: {name}={getattr(request, name)}: use ml.serve.Engine, which does that"
                )
        longest = self.config.max_length
        if not prompt:
            raise UserError(f"prompt {index} is empty: begin it with the beginning-of-text token")
        if not 0 <= min(prompt) <= max(prompt) < self.config.vocab_size:
            raise UserError(
                f"prompt {index} holds token ids up to {max(prompt)}, but the model has {self.config.vocab_size} "
                "embeddings: use the tokenizer it was trained with"
            )
        if len(prompt) >= longest:
            raise UserError(
                f"prompt {index} is {len(prompt)} tokens long, the model's longest sequence {longest}: "
                f"shorten the prompt to at most {longest - 1} tokens"
            )
        if len(prompt) + request.max_tokens > longest:
            raise UserError(
                f"prompt {index} is {len(prompt)} tokens long and max_tokens={request.max_tokens}, but the model's "
                f"longest sequence is {longest}: set max_tokens to at most {longest - len(prompt)}"
            )

    def _generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        requests: Sequence[SamplingParams],
        report: Callable[[int, list[int]], None],
    ) -> list[Completion]:
        stops = [frozenset(self._stop_ids + request.stop_token_ids) for request in requests]
        room = self._bucket(max(len(p) + r.max_tokens for p, r in zip(prompts, requests, strict=True)))
        tokens, batch = _pad(prompts, requests, stops, self._bucket(max(map(len, prompts))), room)
        cache, rows = _prefill(self._model, self._params, tokens, batch)
        written: list[list[int]] = [[] for _ in prompts]
        reasons: list[Literal["stop", "length"] | None] = [None] * len(prompts)
        chunk = rows.tokens[:, None]
        while True:
            # The next steps are on their way before this chunk is read: the device does not wait for the host.
            cache, rows, following = _decode(self._model, self._steps, self._params, cache, rows, batch)
            for row, new in enumerate(np.asarray(chunk)[: len(prompts)].tolist()):
                if reasons[row] is not None:
                    continue
                kept, reasons[row] = _read(new, stops[row], requests[row].max_tokens - len(written[row]))
                written[row] += kept
                if kept:
                    report(row, kept)
            if all(reasons):
                return [Completion(w, reason or "length") for w, reason in zip(written, reasons, strict=True)]
            chunk = following

    def _bucket(self, length: int) -> int:
        return min(max(_power_of_two(length), _SHORTEST_BUCKET), self.config.max_length)


@flax.struct.dataclass
class _Batch:
    """What stays the same for a batch from step to step; each row has pages of its own."""

    block_table: Int[Array, "rows pages_per_row"]
    lengths: Int[Array, " rows"]
    max_tokens: Int[Array, " rows"]
    stop_ids: Int[Array, "rows stops"]
    sampling: SamplingRows


@flax.struct.dataclass
class _Rows:
    """Where each row stands: its newest token, not yet in the cache; how many it has drawn; whether it is finished."""

    tokens: Int[Array, " rows"]
    drawn: Int[Array, " rows"]
    done: Bool[Array, " rows"]


@functools.partial(jax.jit, static_argnums=0)
def _prefill(
    model: Transformer, params: PyTree, tokens: Int[Array, "rows length"], batch: _Batch
) -> tuple[PagedCache, _Rows]:
    """Runs the prompts and draws the first token of each row."""
    cache = empty_cache(model.config, batch.block_table.size, _PAGE_SIZE, model.dtype)
    out: Any = model.apply({"params": params}, tokens, PrefillAttention(batch.block_table), None, cache)
    hidden, cache, _ = out
    last = jnp.take_along_axis(hidden, (batch.lengths - 1)[:, None, None], axis=1)
    nothing_drawn = jnp.zeros_like(batch.lengths)
    rows = _Rows(jnp.full_like(batch.lengths, _NOTHING), nothing_drawn, batch.max_tokens == 0)
    return cache, _draw(model, params, last, rows, batch)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _decode(
    model: Transformer, steps: int, params: PyTree, cache: PagedCache, rows: _Rows, batch: _Batch
) -> tuple[PagedCache, _Rows, Int[Array, "rows steps"]]:
    """Draws up to ``steps`` more tokens per row; finished rows get none, and when all are finished it stops."""

    def unfinished(carry):
        step, _, rows, _ = carry
        return (step < steps) & ~rows.done.all()

    def advance(carry):
        step, cache, rows, chunk = carry
        # A finished row goes on at its last place, so that shapes stay; nobody reads what it writes there.
        lengths = batch.lengths + rows.drawn
        tokens = jnp.maximum(rows.tokens, 0)[:, None]
        attention = PagedAttention(batch.block_table, lengths)
        out: Any = model.apply({"params": params}, tokens, attention, (lengths - 1)[:, None], cache)
        hidden, cache, _ = out
        rows = _draw(model, params, hidden, rows, batch)
        return step + 1, cache, rows, chunk.at[:, step].set(rows.tokens)

    chunk = jnp.full((len(rows.tokens), steps), _NOTHING, jnp.int32)
    _, cache, rows, chunk = jax.lax.while_loop(unfinished, advance, (0, cache, rows, chunk))
    return cache, rows, chunk


def _draw(
    model: Transformer, params: PyTree, hidden: Float[Array, "rows 1 embed"], rows: _Rows, batch: _Batch
) -> _Rows:
    """Draws the next token of each unfinished row."""
    logits: Any = model.apply({"params": head_params(model.config, params)}, hidden, method="logits")
    tokens = sample(logits[:, 0], batch.sampling, rows.drawn)
    drawn = rows.drawn + ~rows.done
    stopped = (tokens[:, None] == batch.stop_ids).any(axis=1)
    return _Rows(jnp.where(rows.done, _NOTHING, tokens), drawn, rows.done | stopped | (drawn >= batch.max_tokens))


def _pad(
    prompts: Sequence[Sequence[int]],
    requests: Sequence[SamplingParams],
    stops: Sequence[frozenset[int]],
    length: int,
    room: int,
) -> tuple[np.ndarray, _Batch]:
    """Prompts padded on the right to ``length`` and rows to a power of two; rows that only pad want no token.

    Each row gets pages for ``room`` tokens.
    """
    count = _power_of_two(len(prompts))
    tokens = np.zeros((count, length), np.int32)
    lengths, max_tokens = np.ones(count, np.int32), np.zeros(count, np.int32)
    stop_ids = np.full((count, _power_of_two(max(4, *map(len, stops)))), _NOTHING, np.int32)
    for row, (prompt, request) in enumerate(zip(prompts, requests, strict=True)):
        tokens[row, : len(prompt)] = prompt
        lengths[row], max_tokens[row] = len(prompt), request.max_tokens
        stop_ids[row, : len(stops[row])] = sorted(stops[row])
    idle = [SamplingParams(temperature=0.0)] * (count - len(prompts))
    sampling = SamplingRows.of([*requests, *idle])
    pages = -(-room // _PAGE_SIZE)
    block_table = jnp.arange(count * pages, dtype=jnp.int32).reshape(count, pages)
    return tokens, _Batch(block_table, jnp.asarray(lengths), jnp.asarray(max_tokens), jnp.asarray(stop_ids), sampling)


def _read(new: list[int], stops: frozenset[int], room: int) -> tuple[list[int], Literal["stop", "length"] | None]:
    """What of a chunk belongs to the text, and why the text ends there, if it does."""
    kept: list[int] = []
    for token in new:
        if token in stops:
            return kept, "stop"
        kept.append(token)
        if len(kept) == room:
            return kept, "length"
    return kept, None


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
