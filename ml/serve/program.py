"""What runs on the device: one step of a batch as a pure function, for shapes that are fixed beforehand."""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from ml.models import Transformer, head_params
from ml.models.parameters import placed
from ml.serve.cached_attention import PagedAttention
from ml.serve.sampling import Constraints, Logprobs, Penalties, SamplingRows, logprobs, sample
from pallas_kernels.paged_attention import Implementation, PagedCache
from pallas_kernels.sharded import on_shards
from pallas_kernels.shared_prefix_attention import SharedPrefixPlan

# Tokens of prompts whose log-probabilities are computed at once: logits of all would be large.
_LOGITS_AT_ONCE = 64


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a program is compiled for.

    Attributes:
      rows: sequences.
      tokens: tokens fed; ``None``: one per row, and as many decode steps as the batch says.
      planned: whether rows read shared prefixes by a plan.
      top: log-probabilities of so many likeliest tokens beside the drawn ones; ``None``: none at all.
      prompt_top: likewise of the prompt's tokens.
      penalizes: whether what was written before changes the logits.
      biases: biased tokens per row.
      masked: whether a grammar says what a row may draw.
      drafts: most guesses among the tokens that a row feeds, if any does: see `Places`.
    """

    rows: int
    tokens: int | None
    planned: bool = False
    top: int | None = None
    prompt_top: int | None = None
    penalizes: bool = False
    biases: int = 0
    masked: bool = False
    drafts: int = 0

    @property
    def places(self) -> int:
        """Most tokens that are drawn, where there are guesses."""
        assert self.tokens is not None
        return min(self.tokens, self.rows * (self.drafts + 1))


@dataclasses.dataclass(frozen=True)
class Fixed:
    """What all programs of an engine have in common.

    Attributes:
      steps: most decode steps of a dispatch.
      invariant: see `ml.serve.engine_config.EngineConfig`.
      implementation: of attention; see `pallas_kernels.paged_attention`.
    """

    steps: int
    invariant: bool
    implementation: Implementation


@flax.struct.dataclass
class State:
    """What stays on the device from step to step: the cache, and the last token drawn in each of the slots."""

    cache: PagedCache
    last: Int[Array, " slots"]


@flax.struct.dataclass
class Written:
    """Likewise, where penalties are asked for: see `ml.serve.sampling.Penalties`."""

    count: Int[Array | np.ndarray, "slots vocab"]
    seen: Bool[Array | np.ndarray, "slots vocab"]


@flax.struct.dataclass
class Places:
    """After which of the tokens fed one is drawn, where rows that feed guesses draw after each of these too.

    Attributes:
      token: place among the tokens fed.
      row: whose it is; a number beyond the rows: padding.
      ahead: tokens that the same row draws in this step before that one.
    """

    token: Int[Array | np.ndarray, " places"]
    row: Int[Array | np.ndarray, " places"]
    ahead: Int[Array | np.ndarray, " places"]


@flax.struct.dataclass
class Batch:
    """A step as arrays; rows and tokens beyond those in use are padding.

    Attributes:
      tokens: those fed; negative: the last one drawn in the row's slot.
      query_starts: where each row's tokens begin.
      lengths: tokens of each row, those fed included; 0: padding.
      block_table: pages of each row.
      slot: of each row.
      samples: tokens that each row draws; 0: none, or some that do not count as drawn before the host has looked.
      number: tokens that each row has drawn before.
      steps: forward passes.
      sampling, constraints, penalties: how rows draw; penalties are presence, frequency and repetition.
      plan: what rows share.
      following: after each token fed, the next one of the prompt.
      places: of what is drawn; ``None``: after the last token of each row.
    """

    tokens: Int[Array | np.ndarray, " tokens"]
    query_starts: Int[Array | np.ndarray, " rows+1"]
    lengths: Int[Array | np.ndarray, " rows"]
    block_table: Int[Array | np.ndarray, "rows pages_per_row"]
    slot: Int[Array | np.ndarray, " rows"]
    samples: Int[Array | np.ndarray, " rows"]
    number: Int[Array | np.ndarray, " rows"]
    steps: Int[Array | np.ndarray, ""]
    sampling: SamplingRows
    constraints: Constraints | None = None
    penalties: tuple[Float[Array | np.ndarray, " rows"], ...] | None = None
    plan: SharedPrefixPlan | None = None
    following: Int[Array | np.ndarray, " tokens"] | None = None
    places: Places | None = None

    def by_place(self) -> "Batch":
        """With an entry per place where there was one per row, in all that says how tokens are drawn."""
        if self.places is None:
            return self
        row = self.places.row
        each = functools.partial(jax.tree.map, lambda x: jnp.asarray(x).at[row].get(mode="clip"))
        return dataclasses.replace(
            self,
            slot=each(self.slot),
            samples=jnp.asarray(self.samples).at[row].get(mode="fill", fill_value=0),  # padding draws nothing
            number=each(self.number) + self.places.ahead,
            sampling=each(self.sampling),
            constraints=each(self.constraints),
            penalties=each(self.penalties),
        )


@functools.partial(jax.jit, donate_argnums=0)
def copy_pages(cache: PagedCache, source: Int[Array, " copies"], target: Int[Array, " copies"]) -> PagedCache:
    """Copies pages of all layers; a target beyond the cache: none."""

    def local(cache, source, target):
        return jax.tree.map(lambda x: x.at[:, target].set(x[:, source], mode="drop"), cache)

    return on_shards(local, (cache, source, target), cache)


@functools.partial(jax.jit, donate_argnums=0)
def begin_text(
    written: Written, slot: Int[Array, ""], count: Int[Array, " vocab"], seen: Bool[Array, " vocab"]
) -> Written:
    """Says what was written before in a slot."""
    before: Any = written
    return Written(before.count.at[slot].set(count), before.seen.at[slot].set(seen))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(4, 5))
def run_step(
    model: Transformer,
    fixed: Fixed,
    kind: Kind,
    params: PyTree,
    state: State,
    written: Written | None,
    batch: Batch,
) -> tuple[State, Written | None, Int[Array, "passes drawn"], Logprobs | None, Logprobs | None]:
    """One forward pass over all rows, or, if each feeds one token, several over those that draw again.

    Returns:
      What stays; the tokens drawn in each pass, by row or place; their log-probabilities, with the same axes; those of
      the prompts' tokens.
    """
    step = functools.partial(_pass, model, fixed, kind, params, batch)
    last = state.last.at[batch.slot].get(mode="clip")
    if kind.tokens is not None:
        row = jnp.searchsorted(batch.query_starts, jnp.arange(kind.tokens), side="right") - 1
        tokens = jnp.where(batch.tokens < 0, last[jnp.minimum(row, kind.rows - 1)], batch.tokens)
        state, written, drawn, given, prompt = step(state, written, tokens, 0)
        return state, written, drawn[None], jax.tree.map(lambda x: x[None], given), prompt
    tokens = jnp.where(batch.tokens < 0, last, batch.tokens)
    shapes = jax.eval_shape(step, state, written, tokens, 0)[2:4]
    out = jax.tree.map(lambda x: jnp.zeros((fixed.steps, *x.shape), x.dtype), shapes)

    def advance(i, carry):
        state, written, tokens, out = carry
        state, written, drawn, given, _ = step(state, written, tokens, i)
        return state, written, drawn, jax.tree.map(lambda x, y: x.at[i].set(y), out, (drawn, given))

    state, written, _, out = jax.lax.fori_loop(0, batch.steps, advance, (state, written, tokens, out))
    return state, written, *out, None


def _pass(model, fixed, kind, params, batch, state, written, tokens, i):
    """Feeds tokens, and draws one in every row or place (some of which nobody wants); ``i`` passes went before."""
    active = batch.samples > i
    # A row that draws no more is an empty slot from here on, as padding is.
    lengths = jnp.where((active | (i == 0)) & (batch.lengths > 0), batch.lengths + i, 0)
    starts = None if kind.tokens is None else batch.query_starts
    attention = PagedAttention(
        batch.block_table, lengths, starts, batch.plan, invariant=fixed.invariant, implementation=fixed.implementation
    )
    position = jnp.maximum(attention.places(tokens.shape[0])[1], 0)
    shape = (-1, 1) if starts is None else (1, -1)
    out: Any = model.apply({"params": params}, tokens.reshape(shape), attention, position.reshape(shape), state.cache)
    hidden = out[0].reshape(tokens.shape[0], -1)
    head = {"params": head_params(model.config, params)}

    def raw_logits(hidden):
        logits: Any = model.apply(head, hidden[:, None], method="logits")
        return placed(logits, model.place(None, None, None))[:, 0]  # whole: all devices draw the same

    prompt = None
    if kind.prompt_top is not None:
        prompt = jax.lax.map(
            lambda x: jax.tree.map(lambda y: y[0], logprobs(raw_logits(x[0][None]), x[1][None], kind.prompt_top)),
            (hidden, batch.following),
            batch_size=min(_LOGITS_AT_ONCE, tokens.shape[0]),
        )
    if batch.places is not None:
        hidden = hidden[batch.places.token]
    elif starts is not None:
        hidden = hidden[jnp.maximum(starts[1:] - 1, 0)]
    batch = batch.by_place()
    active = batch.samples > i
    raw = logits = raw_logits(hidden)
    penalties = None
    if kind.penalizes:
        rows = (x.at[batch.slot].get(mode="clip") for x in (written.count, written.seen))
        penalties = Penalties(*rows, *batch.penalties)
        logits = penalties.apply(logits)
    if batch.constraints is not None:
        logits = batch.constraints.apply(logits)
    drawn = sample(logits, batch.sampling, batch.number + i)
    given = None if kind.top is None else logprobs(raw, drawn, kind.top)
    slot = jnp.where(active, batch.slot, state.last.shape[0])
    state = State(out[1], state.last.at[slot].set(drawn, mode="drop"))
    if penalties is not None:
        after = penalties.after(drawn, active)
        written = Written(
            written.count.at[slot].set(after.written, mode="drop"), written.seen.at[slot].set(after.seen, mode="drop")
        )
    return state, written, drawn, given, prompt
