"""Choosing the next token on the device: greedy, or drawn after penalties, temperature, top-k, top-p and min-p."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from ml.serve.grammar import StructuredOutput

# Most tokens whose log-probabilities are given beside the drawn one's, and most biased tokens of a request (OpenAI's).
MAX_LOGPROBS = 20
MAX_BIASES = 300


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """What one request asks for; the names are vLLM's and OpenAI's.

    Attributes:
      max_tokens: most tokens to generate.
      min_tokens: no stop token is drawn before this many.
      temperature: divides the logits; 0: always the likeliest token.
      top_k: draw from this many likeliest tokens; 0: from all.
      top_p: draw from the fewest likeliest tokens that hold this much probability (Holtzman et al. 2020), counted
        among those that ``top_k`` leaves; 1: from all.
      min_p: draw from tokens at least this probable, as a fraction of the likeliest (Nguyen et al. 2024); 0: from all.
      presence_penalty: subtracted from the logit of every token already written.
      frequency_penalty: subtracted once for every time that it was written.
      repetition_penalty: divides the positive and multiplies the negative logits of tokens in prompt or text (Keskar et
        al. 2019, CTRL); 1: none.
      logit_bias: added to the logits of tokens.
      seed: of this request; its text depends on nothing else in the batch.
      stop_token_ids: tokens that end the text, besides the model's own; they are not part of it.
      ignore_eos: the model's own end of text does not end it.
      n: texts to write, with seeds ``seed``, ``seed + 1``, and so on.
      logprobs: give the log-probability of each token, and of so many likeliest ones; ``None``: give none.
      stop: strings that end the text. They are looked for where text is, in `ml.serve.text`; not in the engine.
      prompt_logprobs: likewise of the prompt's tokens, which are then computed even if they are cached.
      best_of: texts to write, of which the ``n`` with the highest log-probability per token are given; ``None``: ``n``.
      structured_output: what the text must look like; it ends where nothing can follow, ``min_tokens`` or not.
    """

    max_tokens: int = 128
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None
    stop: tuple[str, ...] = ()
    prompt_logprobs: int | None = None
    best_of: int | None = None
    structured_output: StructuredOutput | None = None

    def __post_init__(self):
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens}: must be at least 1")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens}: must lie between 0 and max_tokens={self.max_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature={self.temperature}: must be 0 (always the likeliest token) or more, often 0.8"
            )
        if not 0 <= self.top_k < 2**31:
            raise ValueError(f"top_k={self.top_k}: must be 0 (all tokens) or more, often 40, and below {2**31}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be above 0 and at most 1 (all tokens), often 0.95")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p}: must lie between 0 (all tokens) and 1, often 0.05")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise ValueError(f"{name}={getattr(self, name)}: must lie between -2 and 2; 0: none")
        if not 0.001 <= self.repetition_penalty <= 1000:
            raise ValueError(
                f"repetition_penalty={self.repetition_penalty}: must lie between 0.001 and 1000; 1: none, often 1.1"
            )
        if len(self.logit_bias) > MAX_BIASES:
            raise ValueError(f"logit_bias has {len(self.logit_bias)} entries: at most {MAX_BIASES} are allowed")
        for token, bias in self.logit_bias.items():
            if token < 0 or not -100 <= bias <= 100:
                raise ValueError(f"logit_bias[{token}]={bias}: tokens are numbers from 0, biases lie in -100 .. 100")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed}: must lie between 0 and {2**32 - 1}")
        if self.n < 1:
            raise ValueError(f"n={self.n}: must be at least 1")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= MAX_LOGPROBS:
                raise ValueError(f"{name}={value}: must lie between 0 and {MAX_LOGPROBS}")
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"best_of={self.best_of}: must be at least n={self.n}")
        if isinstance(self.stop, str) or not all(self.stop):
            raise ValueError(f"stop={self.stop!r}: must be a tuple of strings, none of them empty")

    @property
    def samples(self) -> int:
        """Texts to write, whether or not all are given."""
        return self.n if self.best_of is None else self.best_of

    @property
    def ranked(self) -> int | None:
        """Likeliest tokens whose log-probabilities are needed beside the drawn one's; ``None``: not even that."""
        return 0 if self.logprobs is None and self.samples > self.n else self.logprobs

    @property
    def penalizes(self) -> bool:
        """Whether what was written before changes the logits."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    @property
    def speculates(self) -> bool:
        """Whether tokens after a guess are drawn by the same rules as the one before it, whatever the guess is."""
        return not (self.penalizes or self.min_tokens or self.structured_output is not None)


@flax.struct.dataclass
class SamplingRows:
    """The sampling parameters of a batch, one entry per row."""

    seed: UInt32[Array, " rows"]
    temperature: Float[Array, " rows"]
    top_k: Int[Array, " rows"]
    top_p: Float[Array, " rows"]
    min_p: Float[Array, " rows"]

    @classmethod
    def of(cls, requests: Sequence[SamplingParams]) -> "SamplingRows":
        """Stacks ``requests``, on the host."""

        def column(name: str, dtype: type) -> Any:
            return np.array([getattr(request, name) for request in requests], dtype)

        return cls(
            seed=column("seed", np.uint32),
            temperature=column("temperature", np.float32),
            top_k=column("top_k", np.int32),
            top_p=column("top_p", np.float32),
            min_p=column("min_p", np.float32),
        )

    @property
    def key(self) -> Key[Array, " rows"]:
        """Keys of the rows' generators; named, so that a process-wide choice of another changes no one's text."""
        return jax.vmap(lambda seed: jax.random.key(seed, impl="threefry2x32"))(self.seed)


@flax.struct.dataclass
class Penalties:
    """What rows have written, and what that costs them.

    Attributes:
      written: how often each token was drawn.
      seen: whether it is in the prompt or was drawn.
      presence, frequency, repetition: see `SamplingParams`.
    """

    written: Int[Array, "rows vocab"]
    seen: Bool[Array, "rows vocab"]
    presence: Float[Array, " rows"]
    frequency: Float[Array, " rows"]
    repetition: Float[Array, " rows"]

    def apply(self, logits: Float[Array, "rows vocab"]) -> Float[Array, "rows vocab"]:
        """Logits after the penalties, in vLLM's order: repetition, frequency, presence."""
        repetition = jnp.where(self.seen, self.repetition[:, None], 1.0)
        logits = jnp.where(logits > 0, logits / repetition, logits * repetition)
        logits = logits - self.frequency[:, None] * self.written
        return logits - self.presence[:, None] * (self.written > 0)

    def after(self, tokens: Int[Array, " rows"], drawn: Bool[Array, " rows"]) -> "Penalties":
        """With ``tokens`` written in the rows that drew one."""
        rows = jnp.arange(tokens.shape[0])
        tokens = jnp.where(drawn, tokens, self.written.shape[1])  # out of range: dropped
        return dataclasses.replace(
            self,
            written=self.written.at[rows, tokens].add(1, mode="drop"),
            seen=self.seen.at[rows, tokens].set(True, mode="drop"),
        )


@flax.struct.dataclass
class Constraints:
    """What rows may draw, apart from chance.

    Attributes:
      bias_token: tokens with a bias; a number beyond the vocabulary: none.
      bias: added to their logits.
      allowed: a bit per token, the lowest first: whether a grammar lets it come next; ``None``: no row has a grammar.
    """

    bias_token: Int[Array | np.ndarray, "rows biases"]
    bias: Float[Array | np.ndarray, "rows biases"]
    allowed: UInt32[Array | np.ndarray, "rows words"] | None = None

    def apply(self, logits: Float[Array, "rows vocab"]) -> Float[Array, "rows vocab"]:
        """Logits with biases; -inf forbids a token."""
        rows, vocab = logits.shape
        logits = logits.at[jnp.arange(rows)[:, None], self.bias_token].add(self.bias, mode="drop")
        if self.allowed is None:
            return logits
        bits = (self.allowed[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
        return jnp.where(bits.reshape(rows, -1)[:, :vocab] == 1, logits, -jnp.inf)


@flax.struct.dataclass
class Logprobs:
    """Log-probabilities under the model itself, before penalties, biases and temperature.

    Attributes:
      drawn: of the given token.
      rank: how many tokens are likelier.
      top: of the likeliest tokens, in order.
      top_token: those tokens.
    """

    drawn: Float[Array, " rows"]
    rank: Int[Array, " rows"]
    top: Float[Array, "rows top"]
    top_token: Int[Array, "rows top"]

    def on_host(self) -> "Logprobs":
        """With arrays of NumPy; waits for the device."""
        return jax.device_get(self)


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Of one generated token, on the host: its log-probability, its rank, and the likeliest tokens', in order."""

    logprob: float
    rank: int
    top: Mapping[int, float]


def logprobs(logits: Float[Array, "rows vocab"], tokens: Int[Array, " rows"], top: int) -> Logprobs:
    """Those of ``tokens``, and of the ``top`` likeliest."""
    logits = logits.astype(jnp.float32)
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)
    values, ids = jax.lax.top_k(logits, top) if top else (logits[:, :0], jnp.zeros((logits.shape[0], 0), jnp.int32))
    return Logprobs(
        drawn=chosen[:, 0] - normalizer,
        rank=(logits > chosen).sum(axis=-1, dtype=jnp.int32),
        top=values - normalizer[:, None],
        top_token=ids.astype(jnp.int32),
    )


def sample(logits: Float[Array, "rows vocab"], rows: SamplingRows, number: Int[Array, " rows"]) -> Int[Array, " rows"]:
    """Chooses one token per row.

    Args:
      logits: unnormalized log-probabilities, float32, after `Penalties` and `Constraints`; -inf: never.
      rows: how to draw.
      number: how many tokens the row has drawn before: with its key, the only source of randomness.
    """
    likeliest = _likeliest(logits)
    greedy = rows.temperature == 0

    def draw() -> jax.Array:
        scaled = logits - logits.max(axis=-1, keepdims=True)
        scaled = scaled / jnp.where(greedy, 1.0, rows.temperature)[:, None]
        filtered = (rows.top_k > 0) | (rows.top_p < 1) | (rows.min_p > 0)
        # Sorting the vocabulary is the costly part: not for rows that did not ask for it.
        keep = jax.lax.cond(filtered.any(), lambda: _keep(scaled, rows), lambda: jnp.ones_like(scaled, dtype=jnp.bool_))
        keys = jax.vmap(jax.random.fold_in)(rows.key, number)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, scaled.shape[1:]))(keys)
        return _likeliest(jnp.where(keep, scaled + noise, -jnp.inf))

    drawn = jax.lax.cond(greedy.all(), lambda: likeliest, draw)
    return jnp.where(greedy, likeliest, drawn).astype(jnp.int32)


def _likeliest(logits: Float[Array, "rows vocab"]) -> Int[Array, " rows"]:
    """The first of the largest: in two passes with vectors, where XLA:CPU takes argmax's one number at a time."""
    largest = jax.lax.optimization_barrier(logits.max(axis=-1, keepdims=True))
    token = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    last = logits.shape[-1] - 1  # where all are NaN: a token, whatever happened
    return jnp.where(logits == largest, token, last).min(axis=-1)


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
