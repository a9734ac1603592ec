"""What the model wrote after a prompt."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, cast

from ml.serve.sampling import Logprobs, SamplingParams, TokenLogprobs
from ml.serve.scheduling.request import FinishReason
from ml.serve.scheduling.request import Sequence as Sample
from ml.serve.scheduling.step import Update


@dataclasses.dataclass(frozen=True)
class Completion:
    """What the model wrote.

    Attributes:
      tokens: generated ids, without the stop token.
      finish_reason: ``stop`` (a stop token came, or the structured output is whole), ``length`` (``max_tokens``
        reached), ``cancelled``, or ``failed`` (the request could not go on; the log says why).
      logprobs: of each token, if they were asked for.
      prompt_logprobs: of each token of the prompt, if they were asked for; ``None`` for the first, which follows
        nothing.
    """

    tokens: list[int]
    finish_reason: Literal["stop", "length", "cancelled", "failed"]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None


class Gathered:
    """The completions of one request, as they come.

    Attributes:
      prompt_logprobs: as in `Completion`.
    """

    def __init__(self, samples: Sequence[Sample], sampling: SamplingParams):
        self._samples, self._sampling = samples, sampling
        self._logprobs: list[list[TokenLogprobs]] = [[] for _ in samples]
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None

    def push(self, update: Update, logprobs: list[TokenLogprobs] | None) -> list[int]:
        """Takes what a step says of one of the samples; returns the new tokens of its text."""
        tokens = list(update.tokens)
        self._logprobs[update.sequence.index] += logprobs or []
        return tokens[:-1] if update.finish_reason is FinishReason.STOP else tokens

    def completions(self) -> list[Completion]:
        """``n`` of them, when all have ended: the first ones, or the best if there are more."""
        samples = list(self._samples)
        if len(samples) > self._sampling.n:
            samples.sort(key=lambda s: mean_logprob(self._logprobs[s.index]), reverse=True)
        return [self._completion(sample) for sample in samples[: self._sampling.n]]

    def _completion(self, sample: Sample) -> Completion:
        assert sample.finish_reason is not None
        tokens = sample.output
        # A structured output that is whole ends without a stop token.
        if sample.finish_reason is FinishReason.STOP and tokens and tokens[-1] in sample.request.stop_ids:
            tokens = tokens[:-1]
        logprobs = None if self._sampling.logprobs is None else self._logprobs[sample.index][: len(tokens)]
        return Completion(tokens, cast(Any, sample.finish_reason.value), logprobs, self.prompt_logprobs)


def mean_logprob(logprobs: Sequence[TokenLogprobs]) -> float:
    """By what ``best_of`` chooses: per token, a stop token included, so that length alone neither helps nor hurts."""
    return sum(each.logprob for each in logprobs) / len(logprobs) if logprobs else -float("inf")


def token_logprobs(given: Logprobs, place: tuple[int, ...], top: int) -> TokenLogprobs:
    """One token's, of arrays on the host.

    Args:
      given: arrays.
      place: of the token in their leading axes.
      top: how many of the likeliest tokens were asked for.
    """
    likeliest = zip(given.top_token[place][:top].tolist(), given.top[place][:top].tolist(), strict=True)
    return TokenLogprobs(float(given.drawn[place]), int(given.rank[place]), dict(likeliest))
