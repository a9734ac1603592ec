"""Runs the scheduler's steps on the device: few compiled programs over one cache that is updated in place."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Array, Int, PyTree

from ml import memory_maps
from ml.models import Transformer, TransformerConfig
from ml.serve.buckets import Buckets, fit
from ml.serve.cached_attention import empty_cache
from ml.serve.engine_config import EngineConfig
from ml.serve.placement import Placement
from ml.serve.program import Batch, Fixed, Kind, Places, State, Written, begin_text, copy_pages, run_step
from ml.serve.programs import Programs
from ml.serve.sampling import MAX_BIASES, MAX_LOGPROBS, Constraints, Logprobs, SamplingParams, SamplingRows
from ml.serve.scheduling.step import Row, Step
from ml.serve.sharing import Sharing

_NOTHING = -1  # in arrays of tokens: the last one drawn in the row's slot
_COPIES = 16  # pages copied at once
_MORE_ROWS = 4  # times the rows that are needed, rather than compile a program
_TOPS = (0, 5, MAX_LOGPROBS)
_PROMPT_TOPS = _TOPS[1:]  # `jax.lax.map` takes no arrays of size 0
_BIASES = (8, MAX_BIASES + 212, 4096)
# Options of programs, and how much of each a program has: more does for less.
_RANKS: dict[str, Callable[[Any], int]] = {
    "top": lambda top: -1 if top is None else top,
    "penalizes": int,
    "biases": int,
    "masked": int,
}
# What rows that nobody wants draw by.
_IDLE = SamplingParams(temperature=0.0)


@dataclasses.dataclass
class Results:
    """What a step drew, perhaps still being computed: reading it waits for the device.

    Attributes:
      step: the step.
      tokens: those drawn in each forward pass, one per row; or, where there are guesses, row after row in one pass.
      logprobs: theirs, with the same two leading axes, if any row wants them.
      prompt_logprobs: those of the tokens after each token fed, if any row wants them.
      failed: rows for which something went wrong on the host, and what; others are what they would be without these.
    """

    step: Step
    tokens: Int[Array, "passes drawn"]
    logprobs: Logprobs | None
    prompt_logprobs: Logprobs | None
    failed: list[tuple[Row, Exception]]

    @property
    def ready(self) -> bool:
        """Whether the device is done."""
        tokens: Any = self.tokens
        return tokens.is_ready()

    def drawn(self) -> list[list[int]]:
        """Tokens of each row of the step."""
        tokens = np.asarray(self.tokens)
        if not self.step.drafts:
            return [tokens[: row.samples, i].tolist() for i, row in enumerate(self.step.rows)]
        return [tokens[0, begin:end].tolist() for begin, end in itertools.pairwise(self._starts)]

    def place(self, row: int, token: int) -> tuple[int, int]:
        """Where in `tokens` and `logprobs` the ``token``-th of those is that a row of the step drew."""
        return (0, self._starts[row] + token) if self.step.drafts else (token, row)

    @functools.cached_property
    def given(self) -> Logprobs | None:
        """`logprobs`, on the host."""
        return None if self.logprobs is None else self.logprobs.on_host()

    @functools.cached_property
    def _starts(self) -> list[int]:
        return list(itertools.accumulate((row.draws for row in self.step.rows), initial=0))


class Runner:
    """Compiles and runs steps.

    Numbers of rows and tokens are rounded up to a few, and whatever a step can hold is one of few programs, which
    `warm_up` compiles ahead.
    """

    def __init__(
        self,
        config: TransformerConfig,
        params: PyTree,
        settings: EngineConfig,
        *,
        pages: int,
        max_length: int,
        mesh: Mesh | None = None,
    ):
        """Allocates the cache; ``params`` are kept as they are, in their places on the mesh.

        Args:
          config: the architecture.
          params: its parameters.
          settings: of the engine.
          pages: pages of the cache.
          max_length: most tokens of a sequence; with the page size, the width of block tables.
          mesh: see `ml.serve.engine.Engine`.
        """
        self._placement = Placement(config, mesh)
        self._model = Transformer(self._placement.config, dtype=settings.dtype, place=self._placement.spec)
        self._params = self._placement.params(params)
        self._settings, self._pages = settings, pages
        self._fixed = Fixed(settings.decode_steps, settings.invariant, settings.implementation)
        self._width = -(-max_length // settings.page_size)
        self._buckets = Buckets(settings.max_running, settings.token_budget)
        self._state = self._empty()
        self._sharing = Sharing(self._placement.on_one_device, settings, self._state.cache)
        self._written: Written | None = None
        self._of_slot: dict[int, SamplingParams] = {}
        self._on_cpu = jax.default_backend() == "cpu"
        room: Any = {"full": memory_maps.nearly_full, "forget": jax.clear_caches} if self._on_cpu else {}
        self._programs = Programs(self._compile, **room)
        self._warm: list[dict[str, Any]] = []

    def reset(self) -> None:
        """Forgets all sequences; the cache is a new one."""
        nothing: Any = None
        self._state = nothing  # the old cache goes first: there is no room for two
        self._written, self._of_slot = None, {}
        self._state = self._empty()

    def _empty(self) -> State:
        settings = self._settings
        dtype = settings.dtype if settings.cache_dtype is None else settings.cache_dtype
        make = functools.partial(empty_cache, self._model.config, self._pages, settings.page_size, dtype)
        last = np.zeros(settings.max_running, np.int32)
        return State(self._placement.cache(make), self._placement.whole(last))

    @property
    def compilations(self) -> int:
        """Programs that were compiled when a step needed them, since the last warm-up."""
        return self._programs.compilations

    def warm_up(self, samplings: Iterable[SamplingParams], threads: int | None = None) -> int:
        """Compiles every program that steps of any size can need whose rows ask for what one of ``samplings`` does.

        Args:
          samplings: examples. A step whose rows ask for less runs what was compiled for more; one whose rows together
            ask for more than any example does is compiled when it comes.
          threads: that compile at once; ``None``: one per processor.

        Returns:
          How many were compiled.
        """
        keys: list[Any] = ["copy"]
        if self._sharing.enabled:
            _ = self._sharing.crossover
        for sampling in samplings:
            entry = len(sampling.logit_bias) + (len(sampling.stop_token_ids) + 1 if sampling.min_tokens else 0)
            options = self._options([sampling], entry)
            keys += ["begin"] if sampling.penalizes else []
            if options not in self._warm:
                self._warm.append(options)
            for rows, tokens in self._buckets.shapes():
                for planned in (False, True)[: 1 + self._sharing.possible(rows)]:
                    kind = Kind(rows, tokens, planned, **options)
                    kinds = [kind]
                    if tokens is not None and self._settings.speculate:
                        kinds.append(dataclasses.replace(kind, drafts=self._settings.speculate))
                    if tokens is not None and sampling.prompt_logprobs is not None:
                        top = fit(_PROMPT_TOPS, sampling.prompt_logprobs)
                        kinds += [dataclasses.replace(each, prompt_top=top) for each in kinds]
                    keys += kinds
        return self._programs.warm_up(keys, threads)

    def begin(self, slot: int, sampling: SamplingParams, tokens: Sequence[int], prompt: int) -> None:
        """Says how the sequence that now has a slot draws.

        Args:
          slot: the scheduler's number.
          sampling: of the sequence.
          tokens: those known so far.
          prompt: how many of them are the prompt.
        """
        self._of_slot[slot] = sampling
        if sampling.penalizes:
            vocab = self._model.config.vocab_size
            seen = np.zeros(vocab, bool)
            seen[np.asarray(tokens, int)] = True
            count = np.bincount(np.asarray(tokens[prompt:], int), minlength=vocab).astype(np.int32)
            self._written = self._run("begin", self._text(), np.int32(slot), count, seen)

    def run(self, step: Step, allowed: Mapping[int, np.ndarray] | None = None) -> Results:
        """Sends a step to the device and does not wait for it; steps run in the scheduler's order.

        Args:
          step: the next.
          allowed: of rows with a grammar, by their place in the step: see `Constraints.allowed`.
        """
        for begin in range(0, len(step.copies), _COPIES):
            cache = self._run("copy", self._state.cache, *self._copies(step.copies[begin : begin + _COPIES]))
            self._state = dataclasses.replace(self._state, cache=cache)
        params = [self._of_slot.get(row.slot, _IDLE) for row in step.rows]
        entries, failed = [], []
        for row, asked in zip(step.rows, params, strict=True):
            try:
                entries.append(self._entry(row, asked))
            except Exception as error:  # of this row alone, whatever it is
                entries.append({})
                failed.append((row, error))
        tops = [_prompt_top(row, asked) for row, asked in zip(step.rows, params, strict=True)]
        prompt_top = max((top for top in tops if top is not None), default=None)
        decode = all(row.fed == 1 for row in step.rows) and prompt_top is None
        kind = self._ready(
            Kind(
                *self._buckets.shape(len(step.rows), step.fed, decode),
                prompt_top=None if prompt_top is None else fit(_PROMPT_TOPS, prompt_top),
                drafts=self._settings.speculate if step.drafts else 0,
                # Of all rows: a prompt's last chunk, which draws, needs no other program than those before it.
                **self._options(params, max(map(len, entries))),
            )
        )
        batch: Any = self._batch(step, kind, params, entries, allowed or {})
        starts = None if decode else batch.query_starts
        plan = self._sharing.plan(batch.block_table, batch.lengths, starts, len(batch.tokens))
        if plan is not None:
            kind, batch = dataclasses.replace(kind, planned=True), dataclasses.replace(batch, plan=plan)
        written = self._text() if kind.penalizes else None
        out = self._run(kind, self._params, self._state, written, batch)
        self._state, written, tokens, given, prompt = out
        self._written = self._written if written is None else written
        return Results(step, tokens, given, prompt, failed)

    def _run(self, key: Any, *arguments: Any) -> Any:
        program = self._programs[key]
        with self._placement.launching():
            return program(*arguments)

    def _ready(self, kind: Kind) -> Kind:
        """The kind itself, or one with more rows or options, if that is compiled: most jobs end before they win."""
        own = {name: getattr(kind, name) for name in _RANKS}
        for options in [own, *self._warm]:
            if all(rank(options[name]) >= rank(own[name]) for name, rank in _RANKS.items()):
                for rows in self._buckets.above(kind.rows, kind.tokens is None):
                    larger = dataclasses.replace(kind, rows=rows, **options)
                    if rows <= _MORE_ROWS * kind.rows and larger in self._programs:
                        return larger
        return kind

    def _options(self, params: Sequence[SamplingParams], biases: int) -> dict[str, Any]:
        """What rows that draw by ``params`` need of a program, with so many biased tokens at most."""
        top = max((p.ranked for p in params if p.ranked is not None), default=None)
        return {
            "top": None if top is None else fit(_TOPS, top),
            "penalizes": any(p.penalizes for p in params),
            "biases": fit((*_BIASES, max(biases, _BIASES[-1] + 1)), biases) if biases else 0,
            "masked": any(p.structured_output is not None for p in params),
        }

    def _compile(self, key: Any) -> Any:
        logging.log_first_n(logging.INFO, "compiling programs", 1)
        if self._on_cpu:
            memory_maps.check_room()
        with self._placement.context():
            return self._lower(key).compile()

    def _lower(self, key: Any) -> Any:
        described = self._placement.described
        state = described(self._state)
        if key == "copy":
            return copy_pages.lower(state.cache, *described(self._copies(())))
        written = self._no_text()
        if key == "begin":
            vocab = self._model.config.vocab_size
            return begin_text.lower(
                *described((written, np.int32(0), np.zeros(vocab, np.int32), np.zeros(vocab, bool)))
            )
        batch = self._batch(Step(0, (), (), 1), key, (), ())
        if key.planned:
            batch = dataclasses.replace(batch, plan=self._sharing.blank(key.rows, len(batch.tokens)))
        text, batch = described((written if key.penalizes else None, batch))
        return run_step.lower(self._model, self._fixed, key, self._params, state, text, batch)

    def _no_text(self) -> Written:
        shape = (self._settings.max_running, self._model.config.vocab_size)
        return Written(np.zeros(shape, np.int32), np.zeros(shape, bool))

    def _text(self) -> Written:
        if self._written is None:
            self._written = self._placement.whole(self._no_text())
        return self._written

    def _copies(self, copies: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        pairs = np.full((2, _COPIES), self._pages, np.int32)
        if copies:
            pairs[:, : len(copies)] = np.array(copies, np.int32).T
        return np.minimum(pairs[0], self._pages - 1), pairs[1]

    def _batch(
        self,
        step: Step,
        kind: Kind,
        params: Sequence[SamplingParams],
        entries: Sequence[Mapping[int, float]],
        allowed: Mapping[int, np.ndarray] | None = None,
    ) -> Batch:
        rows = kind.rows
        tokens = np.full(rows if kind.tokens is None else kind.tokens, 0, np.int32)
        following = None if kind.prompt_top is None else np.zeros_like(tokens)
        per_row = np.zeros((4, rows), np.int32)
        per_row[0] = self._settings.max_running  # no slot
        table = np.zeros((rows, self._width), np.int32)
        starts = np.zeros(rows + 1, np.int32)
        for i, row in enumerate(step.rows):
            begin = starts[i]
            starts[i + 1] = begin + row.fed
            tokens[begin : starts[i + 1]] = row.tokens or _NOTHING
            table[i, : len(row.table)] = row.table
            # Of what follows a guess the device need not know: the host has the next step fed with what is right.
            counted = 0 if row.drafts else row.samples
            per_row[:, i] = row.slot, row.start + row.fed, counted, row.number
            if following is not None:
                after = row.sequence.request.tokens[row.start + 1 : row.start + row.fed + 1]
                following[begin : begin + len(after)] = after
        starts[len(step.rows) + 1 :] = starts[len(step.rows)]
        params = [*params, *[_IDLE] * (rows - len(params))]
        penalties = constraints = None
        if kind.penalizes:
            names = ("presence_penalty", "frequency_penalty", "repetition_penalty")
            penalties = tuple(np.array([getattr(p, name) for p in params], np.float32) for name in names)
        if kind.biases or kind.masked:
            masks = (allowed or {}) if kind.masked else None
            constraints = _constraints(entries, rows, kind.biases, self._model.config.vocab_size, masks)
        slot, lengths, samples, number = per_row
        return Batch(
            tokens=tokens,
            query_starts=starts,
            lengths=lengths,
            block_table=table,
            slot=slot,
            samples=samples,
            number=number,
            steps=np.asarray(step.decode_steps, np.int32),
            sampling=SamplingRows.of(params),
            constraints=constraints,
            penalties=penalties,
            following=following,
            places=_places(step, starts, kind) if kind.drafts else None,
        )

    def _entry(self, row: Row, params: SamplingParams) -> Mapping[int, float]:
        """Biases of a row, and the stop tokens that it may not draw yet: what is added to the logits of tokens."""
        if row.number < params.min_tokens:
            return {**params.logit_bias, **dict.fromkeys(row.sequence.request.stop_ids, -np.inf)}
        return dict(params.logit_bias)


def _places(step: Step, starts: Int[np.ndarray, " rows+1"], kind: Kind) -> Places:
    token, row, ahead = np.zeros((3, kind.places), np.int32)
    row[:] = kind.rows
    begin = 0
    for i, each in enumerate(step.rows):
        end = begin + each.draws
        token[begin:end] = np.arange(starts[i + 1] - each.draws, starts[i + 1])
        row[begin:end] = i
        ahead[begin:end] = np.arange(each.draws)
        begin = end
    return Places(token, row, ahead)


def _constraints(
    entries: Sequence[Mapping[int, float]],
    rows: int,
    size: int,
    vocab: int,
    masks: Mapping[int, np.ndarray] | None,
) -> Constraints:
    tokens, biases = np.full((rows, size), vocab, np.int32), np.zeros((rows, size), np.float32)
    for i, entry in enumerate(entries):
        tokens[i, : len(entry)], biases[i, : len(entry)] = list(entry), list(entry.values())
    if masks is None:
        return Constraints(tokens, biases)
    words = np.full((rows, -(-vocab // 32)), ~np.uint32(0))
    for i, mask in masks.items():
        words[i] = mask
    return Constraints(tokens, biases, words)


def _prompt_top(row: Row, params: SamplingParams) -> int | None:
    """How many likeliest tokens a row wants beside the prompt's, if it feeds any of which it wants to know."""
    sequence = row.sequence
    wants = not sequence.index and row.start + 1 < len(sequence.request.tokens)
    return params.prompt_logprobs if wants else None
