"""What the model wrote after a prompt."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from ml.serve.sampling import TokenLogprobs


@dataclasses.dataclass(frozen=True)
class Completion:
    """What the model wrote.

    Attributes:
      tokens: generated ids, without the stop token.
      finish_reason: ``stop`` (a stop token came), ``length`` (``max_tokens`` reached), ``cancelled``, or ``failed``
        (the request could not go on; the log says why).
      logprobs: of each token, if they were asked for.
      prompt_logprobs: of each token of the prompt, if they were asked for; ``None`` for the first, which follows
        nothing.
    """

    tokens: list[int]
    finish_reason: Literal["stop", "length", "cancelled", "failed"]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None


def mean_logprob(logprobs: Sequence[TokenLogprobs]) -> float:
    """By which ``best_of`` ranks: per token, so that length alone neither helps nor hurts."""
    return sum(each.logprob for each in logprobs) / len(logprobs) if logprobs else -float("inf")
