"""Choosing the next token on the device: greedy, or drawn after temperature, top-k, top-p and min-p."""

import dataclasses
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """What one request asks for.

    Attributes:
      max_tokens: most tokens to generate.
      temperature: divides the logits; 0: always the likeliest token.
      top_k: draw from this many likeliest tokens; 0: from all.
      top_p: draw from the fewest likeliest tokens that hold this much probability (Holtzman et al. 2020), counted
        among those that ``top_k`` leaves; 1: from all.
      min_p: draw from tokens at least this probable, as a fraction of the likeliest (Nguyen et al. 2024); 0: from all.
      seed: of this request; its text depends on nothing else in the batch.
      stop_ids: tokens that end the text, besides the model's own; they are not part of it.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self):
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens}: must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature={self.temperature}: must be 0 (always the likeliest token) or more, often 0.8"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: must be 0 (all tokens) or more, often 40")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be above 0 and at most 1 (all tokens), often 0.95")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p}: must lie between 0 (all tokens) and 1, often 0.05")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed}: must lie between 0 and {2**32 - 1}")


@flax.struct.dataclass
class SamplingRows:
    """The sampling parameters of a batch, one entry per row, on the device."""

    key: Key[Array, " rows"]
    temperature: Float[Array, " rows"]
    top_k: Int[Array, " rows"]
    top_p: Float[Array, " rows"]
    min_p: Float[Array, " rows"]

    @classmethod
    def of(cls, requests: Sequence[SamplingParams]) -> "SamplingRows":
        """Stacks ``requests``."""
        seeds = jnp.asarray(np.array([r.seed for r in requests], np.uint32))
        return cls(
            # Named, so that a process-wide choice of another generator does not change anyone's text.
            key=jax.vmap(lambda seed: jax.random.key(seed, impl="threefry2x32"))(seeds),
            temperature=jnp.array([r.temperature for r in requests], jnp.float32),
            top_k=jnp.array([r.top_k for r in requests], jnp.int32),
            top_p=jnp.array([r.top_p for r in requests], jnp.float32),
            min_p=jnp.array([r.min_p for r in requests], jnp.float32),
        )


def sample(logits: Float[Array, "rows vocab"], rows: SamplingRows, number: Int[Array, " rows"]) -> Int[Array, " rows"]:
    """Chooses one token per row.

    Args:
      logits: unnormalized log-probabilities, float32.
      rows: how to draw.
      number: how many tokens the row has drawn before: with its key, the only source of randomness.
    """
    likeliest = jnp.argmax(logits, axis=-1)
    greedy = rows.temperature == 0

    def draw() -> jax.Array:
        scaled = logits - logits.max(axis=-1, keepdims=True)
        scaled = scaled / jnp.where(greedy, 1.0, rows.temperature)[:, None]
        filtered = (rows.top_k > 0) | (rows.top_p < 1) | (rows.min_p > 0)
        # Sorting the vocabulary is the costly part: not for rows that did not ask for it.
        keep = jax.lax.cond(filtered.any(), lambda: _keep(scaled, rows), lambda: jnp.ones_like(scaled, dtype=jnp.bool_))
        keys = jax.vmap(jax.random.fold_in)(rows.key, number)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, scaled.shape[1:]))(keys)
        return jnp.argmax(jnp.where(keep, scaled + noise, -jnp.inf), axis=-1)

    drawn = jax.lax.cond(greedy.all(), lambda: likeliest, draw)
    return jnp.where(greedy, likeliest, drawn).astype(jnp.int32)


def _keep(scaled: Float[Array, "rows vocab"], rows: SamplingRows) -> Bool[Array, "rows vocab"]:
    """Which tokens may be drawn; ``scaled`` is 0 at the likeliest. Among equals the lower id ranks first."""
    order = jnp.argsort(scaled, axis=-1, stable=True, descending=True)
    ranked = jnp.take_along_axis(scaled, order, axis=-1)
    rank = jnp.arange(scaled.shape[-1])
    within_k = rank < jnp.where(rows.top_k > 0, rows.top_k, scaled.shape[-1])[:, None]
    probabilities = jax.nn.softmax(jnp.where(within_k, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # The comparison with 1 is apart: rounding in the sum must not cut the tail off for rows that want all of it.
    within_p = (before < rows.top_p[:, None]) | (rows.top_p[:, None] >= 1)
    keep = within_k & within_p & (ranked >= jnp.log(rows.min_p)[:, None])
    return jnp.put_along_axis(jnp.zeros_like(keep), order, keep, axis=-1, inplace=False)
