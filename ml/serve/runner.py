"""Runs the scheduler's steps on the device: few compiled programs over one cache that is updated in place."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from ml.models import Transformer, head_params
from ml.serve.cached_attention import PagedAttention, empty_cache
from ml.serve.sampling import Constraints, Logprobs, Penalties, SamplingParams, SamplingRows, logprobs, sample
from ml.serve.scheduling.step import Row, Step
from pallas_kernels.paged_attention import Implementation, PagedCache
from pallas_kernels.shared_prefix_attention import SharedPrefixPlan

_NOTHING = -1  # in arrays of tokens: the last one drawn in the row's slot


@dataclasses.dataclass(frozen=True)
class RunnerConfig:
    """What the device holds.

    Attributes:
      pages: pages of the cache.
      page_size: tokens in a page.
      max_running: sequences that may run at once.
      max_length: most tokens of a sequence; with the page size, the width of block tables.
      token_budget: most tokens of a step.
      cache_dtype: of keys and values; ``int8`` and ``float8_e4m3fn`` are kept with scales; ``None``: the activations'.
      invariant: see `ml.serve.engine.EngineConfig`.
      implementation: of attention; see `pallas_kernels.paged_attention`.
    """

    pages: int
    page_size: int
    max_running: int
    max_length: int
    token_budget: int
    cache_dtype: Any = None
    invariant: bool = False
    implementation: Implementation = "auto"


@flax.struct.dataclass
class _State:
    """What stays on the device from step to step; slots are the scheduler's."""

    cache: PagedCache
    last: Int[Array, " slots"]
    written: Int[Array, "slots vocab"] | None = None
    seen: Int[Array, "slots vocab"] | None = None


@flax.struct.dataclass
class _Batch:
    """A step as arrays; rows and tokens beyond those in use are padding."""

    tokens: Int[Array | np.ndarray, " tokens"]
    query_starts: Int[Array | np.ndarray, " rows+1"]
    lengths: Int[Array | np.ndarray, " rows"]
    block_table: Int[Array | np.ndarray, "rows pages_per_row"]
    slot: Int[Array | np.ndarray, " rows"]
    samples: Int[Array | np.ndarray, " rows"]
    number: Int[Array | np.ndarray, " rows"]
    sampling: SamplingRows
    constraints: Constraints | None
    penalties: tuple[Float[Array | np.ndarray, " rows"], ...] | None
    plan: SharedPrefixPlan | None


@dataclasses.dataclass(frozen=True)
class _Static:
    """What a program is compiled for, shapes apart."""

    decode: bool
    steps: int
    top: int | None
    invariant: bool
    implementation: Implementation


@dataclasses.dataclass
class Results:
    """What a step drew, perhaps still being computed: reading it waits for the device."""

    step: Step
    tokens: Int[Array, "rows steps"]
    logprobs: list[Logprobs] | None

    def drawn(self) -> list[list[int]]:
        """Tokens of each row of the step."""
        tokens = np.asarray(self.tokens)
        return [tokens[i, : row.samples].tolist() for i, row in enumerate(self.step.rows)]


class Runner:
    """Compiles and runs steps.

    Numbers of rows and tokens are rounded up to powers of two, and whatever a step can hold is one of few programs.
    """

    def __init__(self, model: Transformer, params: PyTree, config: RunnerConfig):
        """Allocates the cache; ``params`` are kept as they are."""
        self.config = config
        self._model, self._params = model, params
        self._width = -(-config.max_length // config.page_size)
        self.reset()

    def reset(self) -> None:
        """Forgets all sequences; the cache is a new one."""
        config, model = self.config, self._model
        self._state: Any = None  # the old cache goes first: there is no room for two
        dtype = model.dtype if config.cache_dtype is None else config.cache_dtype
        cache = empty_cache(model.config, config.pages, config.page_size, dtype)
        self._state = _State(cache, jnp.zeros(config.max_running, jnp.int32))
        self._of_slot: dict[int, SamplingParams] = {}

    @property
    def cache(self) -> PagedCache:
        """Keys and values as the last step left them."""
        return self._state.cache

    def begin(self, slot: int, sampling: SamplingParams, tokens: Sequence[int], prompt: int) -> None:
        """Says how the sequence that now has a slot draws.

        Args:
          slot: the scheduler's number.
          sampling: of the sequence.
          tokens: those known so far.
          prompt: how many of them are the prompt.
        """
        self._of_slot[slot] = sampling
        if not sampling.penalizes:
            return
        state, vocab = self._state, self._model.config.vocab_size
        if state.written is None:
            shape = (self.config.max_running, vocab)
            state = dataclasses.replace(state, written=jnp.zeros(shape, jnp.int32), seen=jnp.zeros(shape, bool))
        seen = np.zeros(vocab, bool)
        seen[np.asarray(tokens, int)] = True
        written = np.bincount(np.asarray(tokens[prompt:], int), minlength=vocab).astype(np.int32)
        before: Any = state
        self._state = dataclasses.replace(
            state, written=before.written.at[slot].set(written), seen=before.seen.at[slot].set(seen)
        )

    def run(self, step: Step, plan: Callable[..., SharedPrefixPlan | None] | None = None) -> Results:
        """Sends a step to the device and does not wait for it.

        Args:
          step: steps run in the scheduler's order.
          plan: gives what the rows share, from block tables, lengths and query starts (``None``: one row each).
        """
        if step.copies:
            cache = _copy(self._state.cache, *self._copies(step))
            self._state = dataclasses.replace(self._state, cache=cache)
        decode = all(row.fed == 1 for row in step.rows)
        batch = self._batch(step, decode)
        if plan is not None:
            starts = None if decode else batch.query_starts
            batch = dataclasses.replace(batch, plan=plan(batch.block_table, batch.lengths, starts, len(batch.tokens)))
        wanted = [self._of_slot[row.slot].logprobs for row in step.rows if row.samples]
        top = max((n for n in wanted if n is not None), default=None)
        static = _Static(
            decode=decode,
            steps=step.decode_steps,
            top=None if top is None else _power_of_two(top) if top else 0,
            invariant=self.config.invariant,
            implementation=self.config.implementation,
        )
        self._state, tokens, given = _run(self._model, static, self._params, self._state, batch)
        return Results(step, tokens, given)

    def _copies(self, step: Step) -> tuple[np.ndarray, np.ndarray]:
        pairs = np.full((2, _power_of_two(len(step.copies))), self.config.pages, np.int32)
        pairs[:, : len(step.copies)] = np.array(step.copies, np.int32).T
        return np.minimum(pairs[0], self.config.pages - 1), pairs[1]

    def _batch(self, step: Step, decode: bool) -> _Batch:
        rows = min(_power_of_two(len(step.rows)), self.config.max_running)
        fed = rows if decode else min(max(16, _power_of_two(step.fed)), max(self.config.token_budget, step.fed))
        tokens = np.full(fed, 0, np.int32)
        per_row = np.zeros((4, rows), np.int32)
        per_row[0] = self.config.max_running  # no slot
        table = np.zeros((rows, self._width), np.int32)
        starts = np.zeros(rows + 1, np.int32)
        for i, row in enumerate(step.rows):
            starts[i + 1] = starts[i] + row.fed
            tokens[starts[i] : starts[i + 1]] = row.tokens or _NOTHING
            table[i, : len(row.table)] = row.table
            per_row[:, i] = row.slot, row.start + row.fed, row.samples, row.number
        starts[len(step.rows) + 1 :] = starts[len(step.rows)]
        slot, lengths, samples, number = per_row
        params = [self._of_slot[row.slot] for row in step.rows]
        params += [SamplingParams(temperature=0.0)] * (rows - len(params))
        penalties = None
        if any(p.penalizes for p in params):
            names = ("presence_penalty", "frequency_penalty", "repetition_penalty")
            penalties = tuple(np.array([getattr(p, name) for p in params], np.float32) for name in names)
        constraints = self._constraints(step.rows, params)
        sampling = SamplingRows.of(params)
        return _Batch(tokens, starts, lengths, table, slot, samples, number, sampling, constraints, penalties, None)

    def _constraints(self, rows: Sequence[Row], params: Sequence[SamplingParams]) -> Constraints | None:
        """Biases, and the stop tokens that a row may not draw yet, as tokens and what is added to their logits."""
        entries: list[Mapping[int, float]] = [p.logit_bias for p in params]
        for i, row in enumerate(rows):
            if row.number < params[i].min_tokens:
                entries[i] = {**entries[i], **dict.fromkeys(row.sequence.request.stop_ids, -np.inf)}
        most = max(map(len, entries))
        if not most:
            return None
        size = _power_of_two(max(8, most))
        tokens = np.full((len(entries), size), self._model.config.vocab_size, np.int32)
        biases = np.zeros((len(entries), size), np.float32)
        for i, entry in enumerate(entries):
            tokens[i, : len(entry)], biases[i, : len(entry)] = list(entry), list(entry.values())
        return Constraints(tokens, biases)


@functools.partial(jax.jit, donate_argnums=0)
def _copy(cache: PagedCache, source: Int[Array, " copies"], target: Int[Array, " copies"]) -> PagedCache:
    return jax.tree.map(lambda x: x.at[:, target].set(x[:, source], mode="drop"), cache)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _run(
    model: Transformer, static: _Static, params: PyTree, state: _State, batch: _Batch
) -> tuple[_State, Int[Array, "rows steps"], list[Logprobs] | None]:
    """One forward pass over all rows, then ``steps - 1`` more over those that draw again."""
    rows = batch.lengths.shape[0]
    row_of_token = jnp.searchsorted(batch.query_starts, jnp.arange(batch.tokens.shape[0]), side="right") - 1
    if static.decode:
        row_of_token = jnp.arange(rows)
    last = state.last.at[batch.slot].get(mode="clip")
    tokens = jnp.where(batch.tokens < 0, last[jnp.minimum(row_of_token, rows - 1)], batch.tokens)
    starts = None if static.decode else batch.query_starts
    state, drawn, given = _pass(model, static, params, state, batch, tokens, batch.lengths, starts, batch.number)
    all_drawn, all_given = [drawn], [given]
    for i in range(1, static.steps):
        # A row that draws no more is an empty slot from here on.
        active = batch.samples > i
        lengths = jnp.where(active, batch.lengths + i, 0)
        numbers = batch.number + i
        state, drawn, given = _pass(model, static, params, state, batch, drawn, lengths, None, numbers, active)
        all_drawn.append(drawn)
        all_given.append(given)
    return state, jnp.stack(all_drawn, axis=1), None if static.top is None else all_given


def _pass(model, static, params, state, batch, tokens, lengths, starts, numbers, active=None):
    """Feeds tokens, and draws one in every row (some of which nobody wants)."""
    active = batch.samples > 0 if active is None else active
    attention = PagedAttention(
        batch.block_table, lengths, starts, batch.plan, invariant=static.invariant, implementation=static.implementation
    )
    position = jnp.maximum(attention.places(tokens.shape[0])[1], 0)
    shape = (-1, 1) if starts is None else (1, -1)
    out: Any = model.apply({"params": params}, tokens.reshape(shape), attention, position.reshape(shape), state.cache)
    hidden = out[0].reshape(tokens.shape[0], -1)
    if starts is not None:
        hidden = hidden[jnp.maximum(starts[1:] - 1, 0)]
    head = {"params": head_params(model.config, params)}
    raw = model.apply(head, hidden[:, None], method="logits")[:, 0]
    logits, penalties = raw, None
    if batch.penalties is not None:
        rows = (x.at[batch.slot].get(mode="clip") for x in (state.written, state.seen))
        penalties = Penalties(*rows, *batch.penalties)
        logits = penalties.apply(logits)
    if batch.constraints is not None:
        logits = batch.constraints.apply(logits)
    drawn = sample(logits, batch.sampling, numbers)
    given = None if static.top is None else logprobs(raw, drawn, static.top)
    slot = jnp.where(active, batch.slot, state.last.shape[0])
    state = dataclasses.replace(state, cache=out[1], last=state.last.at[slot].set(drawn, mode="drop"))
    if penalties is not None:
        after = penalties.after(drawn, active)
        written, seen = (
            x.at[slot].set(y, mode="drop")
            for x, y in zip((state.written, state.seen), (after.written, after.seen), strict=True)
        )
        state = dataclasses.replace(state, written=written, seen=seen)
    return state, drawn, given


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
