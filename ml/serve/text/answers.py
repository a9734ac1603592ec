"""What a model wrote, in OpenAI's form: texts that grow, choices, log-probabilities, usage."""

import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ml.serve.sampling import TokenLogprobs
from ml.serve.scheduling.request import FinishReason
from ml.serve.text.requests import TextRequest
from ml.serve.text.served_model import ServedModel
from ml.serve.text.stop_strings import StoppableText
from ml.serve.text.text_stream import TextStream


class SampleText:
    """One sample of a request: its text as tokens come, and why it ended.

    Attributes:
      prompt: which of the request's prompts it continues.
      index: which of that prompt's samples.
      tokens: those of the text, without a stop token.
      wants_logprobs: whether log-probabilities were asked for.
      logprobs: of each token, if so.
      prompt_logprobs: of the prompt's tokens, to be given where the prompt is echoed; ``None`` for the first.
      finish_reason: ``stop`` or ``length``; ``None`` while it goes on, or if it ended otherwise.
    """

    def __init__(self, model: ServedModel, request: TextRequest, prompt: int = 0, index: int = 0):
        """Starts behind the prompt."""
        self._tokenizer, self._request = model.tokenizer, request
        self.prompt, self.index = prompt, index
        self.wants_logprobs = request.sampling[prompt].logprobs is not None
        self._sum, self._counted = 0.0, 0
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: Sequence[TokenLogprobs | None] = ()
        self.finish_reason: str | None = None

    @functools.cached_property
    def _text(self) -> StoppableText:  # made when it is needed: many samples may wait
        request = self._request
        return StoppableText(
            TextStream(self._tokenizer.decode, request.prompts[self.prompt]),
            request.sampling[self.prompt].stop,
            request.include_stop,
            min_tokens=request.sampling[self.prompt].min_tokens,
        )

    @property
    def text(self) -> str:
        """All that is certain so far."""
        return self._text.text

    @property
    def stopped(self) -> bool:
        """Whether a stop string came; then the sample should be cancelled."""
        return self._text.stopped is not None

    @property
    def mean_logprob(self) -> float:
        """Per token: by what ``best_of`` chooses; only where it does, or where log-probabilities were asked for."""
        return self._sum / self._counted if self._counted else -float("inf")

    @property
    def number(self) -> int:
        """Its place among the choices of the answer, unless ``best_of`` chooses."""
        return self.prompt * self._request.sampling[0].n + self.index

    def push(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs] | None = None) -> str:
        """Takes new tokens, without a stop token; returns the text that is new and certain."""
        before = self._text.tokens
        new = self._text.push(tokens)
        used = self._text.tokens - before
        self.tokens += tokens[:used]
        if logprobs is not None:
            self.logprobs += logprobs[:used] if self.wants_logprobs else ()
            # Where `best_of` chooses, a stop token counts.
            counted = logprobs[: used if used < len(tokens) else len(logprobs)]
            self._sum += sum(each.logprob for each in counted)
            self._counted += len(counted)
        if self.stopped:
            self.finish_reason = "stop"
        return new

    def end(self, reason: FinishReason | str) -> str:
        """The sample has ended; returns the text that was still held back."""
        rest = self._text.finish()
        if self.stopped:
            self.finish_reason = "stop"
        elif reason in (FinishReason.STOP, FinishReason.LENGTH):
            self.finish_reason = str(reason)
        return rest

    def choice(self, number: int | None = None) -> dict[str, Any]:
        """It as one of the answer's choices; ``number``: which, if not its own."""
        common = {"index": self.number if number is None else number, "finish_reason": self.finish_reason}
        if self._request.chat:
            message = {"role": "assistant", "content": self.text, "refusal": None}
            return {**common, "message": message, "logprobs": self.choice_logprobs()}
        echo = self._request.echo[self.prompt] if self._request.echo else ""
        return {**common, "text": echo + self.text, "logprobs": self.choice_logprobs()}

    def choice_logprobs(self, first: int = 0) -> dict[str, Any] | None:
        """Log-probabilities of the tokens from number ``first`` on, in the form of the endpoint.

        Those of an echoed prompt come before its first token's.
        """
        if not self.wants_logprobs:
            return None
        if self._request.chat:
            return {"content": [self._of_token(i) for i in range(first, len(self.logprobs))], "refusal": None}
        echoed = self.prompt_logprobs
        prompt = self._request.prompts[self.prompt][: len(echoed)]
        shown = [self._shown(token) for token in (*prompt, *self.tokens)]
        offsets = [0]
        for text in shown:
            offsets.append(offsets[-1] + len(text))
        begin = first + len(echoed) if first else 0
        given = [*echoed, *self.logprobs][begin:]
        return {
            "tokens": shown[begin:],
            "token_logprobs": [each and each.logprob for each in given],
            "top_logprobs": [each and self._top(each) for each in given],
            "text_offset": offsets[begin:-1],
        }

    def _top(self, given: TokenLogprobs) -> dict[str, float]:
        top: dict[str, float] = {}
        for token, logprob in given.top.items():  # likeliest first; several may read alike
            top.setdefault(self._shown(token), logprob)
        return top

    def _of_token(self, place: int) -> dict[str, Any]:
        given = self.logprobs[place]
        top = [self._entry(token, logprob) for token, logprob in given.top.items()]
        return {**self._entry(self.tokens[place], given.logprob), "top_logprobs": top}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        shown = self._shown(token)
        return {"token": shown, "logprob": logprob, "bytes": list(shown.encode("utf-8"))}

    def _shown(self, token: int) -> str:
        return self._tokenizer.decode([token], skip_special=False)


def answer(
    request_id: str,
    model: ServedModel,
    request: TextRequest,
    samples: Sequence[SampleText],
    cached: Sequence[int],
    created: int | None = None,
) -> dict[str, Any]:
    """The whole answer, of a request whose samples have all ended.

    Args:
      request_id: becomes the answer's id.
      model: what wrote it.
      request: what was asked.
      samples: of all prompts, in any order.
      cached: tokens of each prompt that were found in the cache.
      created: seconds since 1970; ``None``: now.
    """
    return {
        "id": f"{'chatcmpl' if request.chat else 'cmpl'}-{request_id}",
        "object": "chat.completion" if request.chat else "text_completion",
        "created": int(time.time()) if created is None else created,
        "model": model.name,
        "choices": _choices(request, samples),
        "usage": usage(request, samples, cached),
    }


def _choices(request: TextRequest, samples: Sequence[SampleText]) -> list[dict[str, Any]]:
    chosen: list[SampleText] = []
    for prompt, sampling in enumerate(request.sampling):
        own = sorted((s for s in samples if s.prompt == prompt), key=lambda s: s.index)
        if len(own) > sampling.n:
            own.sort(key=lambda s: s.mean_logprob, reverse=True)
        chosen += own[: sampling.n]
    return [sample.choice(number) for number, sample in enumerate(chosen)]


def usage(request: TextRequest, samples: Sequence[SampleText], cached: Sequence[int]) -> Mapping[str, Any]:
    """Tokens of prompts, of them cached, and of completions; a prompt counts once, however many samples it has."""
    prompt = sum(map(len, request.prompts))
    completion = sum(len(sample.tokens) for sample in samples)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(cached)},
    }
