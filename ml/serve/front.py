"""What callers ask of an engine, however many replicas it is: requests one by one, jobs, and completions of a list."""

import abc
from collections.abc import Callable, Iterable, Sequence

from ml.errors import UserError
from ml.models import TransformerConfig
from ml.serve.completion import Completion, Gathered
from ml.serve.engine_config import EngineConfig
from ml.serve.sampling import SamplingParams, TokenLogprobs
from ml.serve.scheduling.request import Request
from ml.serve.scheduling.request import Sequence as Sample
from ml.serve.scheduling.statistics import Load, Statistics
from ml.serve.scheduling.step import Update

# What `Front.step` says of a sample: its new tokens, and their log-probabilities if they are needed.
News = tuple[Update, list[TokenLogprobs] | None]


class Front(abc.ABC):
    """An engine as its callers see it. One thread at a time.

    Attributes:
      config: the architecture.
      engine: how much runs at once, in each replica.
    """

    config: TransformerConfig
    engine: EngineConfig

    @property
    @abc.abstractmethod
    def statistics(self) -> Statistics:
        """Counts since the beginning: one object, that goes on counting."""

    @property
    @abc.abstractmethod
    def unfinished(self) -> bool:
        """Whether `step` has anything to do."""

    @property
    @abc.abstractmethod
    def load(self) -> Load:
        """What runs now."""

    @abc.abstractmethod
    def warm_up(self, samplings: Iterable[SamplingParams] = (SamplingParams(),), *, threads: int | None = None) -> int:
        """Compiles ahead, so that no request waits for a compiler; the persistent compilation cache makes it quick.

        Args:
          samplings: examples of what requests will ask for. Programs differ by penalties, biases (and ``min_tokens``),
            log-probabilities, and whether the output is structured; not by other parameters, nor by lengths and numbers
            of requests.
          threads: that compile at once; ``None``: one per processor.

        Returns:
          How many programs were compiled. `Statistics.compilations` counts from here on.
        """

    @abc.abstractmethod
    def request(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        request_id: str | None = None,
        priority: int = 0,
        salt: str = "",
    ) -> Request:
        """A request that is checked and not queued; arguments and errors as for `add`."""

    @abc.abstractmethod
    def queue(self, request: Request, sampling: SamplingParams) -> list[Sample]:
        """Queues what `request` gave; errors as for `add`."""

    @abc.abstractmethod
    def queue_all(
        self, requests: Sequence[Request], samplings: Sequence[SamplingParams], numbers: Sequence[int] | None = None
    ) -> list[list[Sample]]:
        """Queues a job; errors, as for `add_all`, name a request by its number."""

    @abc.abstractmethod
    def cancel(self, request_id: str, index: int | None = None) -> list[Update]:
        """Ends a request, or one sample of it; the next step has its pages.

        An id that is not known (any more) is no error.
        """

    @abc.abstractmethod
    def reset(self) -> None:
        """Ends all requests and makes the cache anew: after a step failed, nothing on the device is to be trusted."""

    @abc.abstractmethod
    def prompt_logprobs(self, request_id: str) -> list[TokenLogprobs | None] | None:
        """Log-probabilities of a prompt's tokens, if they were asked for.

        They are complete when a sample has its first token, and are forgotten at the first `step` after its last.
        """

    @abc.abstractmethod
    def step(self) -> list[News]:
        """Sends the next step to the device and takes in the results of the one before it, while the device works.

        Returns:
          What is new of every sample, with log-probabilities of the new tokens if they were asked for.
        """

    def add(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        request_id: str | None = None,
        priority: int = 0,
        salt: str = "",
    ) -> list[Sample]:
        """Queues a request; returns its ``sampling.samples`` samples, which `step` speaks of.

        Args:
          prompt: token ids, at least one.
          sampling: what is asked for.
          request_id: names it; ``None``: a number.
          priority: smaller goes first.
          salt: requests share cached tokens only with those of the same salt.

        Raises:
          UserError: an empty prompt, an id outside the vocabulary, more tokens than the model or the cache takes, or a
            structured output that cannot be had.
        """
        return self.queue(self.request(prompt, sampling, request_id, priority, salt), sampling)

    def add_all(
        self,
        prompts: Sequence[Sequence[int]],
        samplings: Sequence[SamplingParams],
        request_ids: Sequence[str] | None = None,
    ) -> list[list[Sample]]:
        """Queues a job; with ``schedule="planned"`` in an engine that has nothing else to do, in the planned order.

        Args:
          prompts: token ids, at least one each.
          samplings: one each.
          request_ids: likewise; ``None``: numbers.

        Raises:
          UserError: see `add`; then none is queued.
        """
        ids = [None] * len(prompts) if request_ids is None else request_ids
        requests: list[Request] = []
        try:
            for prompt, sampling, name in zip(prompts, samplings, ids, strict=True):
                requests.append(self.request(prompt, sampling, name))
        except UserError as error:
            raise UserError(f"prompt {len(requests)}: {error}") from error
        return self.queue_all(requests, samplings)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
        on_tokens: Callable[[int, list[int]], None] | None = None,
    ) -> list[list[Completion]]:
        """Continues each prompt, ``n`` times.

        Args:
          prompts: token ids, at least one each.
          sampling: one for all prompts, or one each.
          on_tokens: called with a prompt's index and the new tokens of its first sample as they come; not where
            ``best_of`` chooses among more samples than it gives.

        Raises:
          UserError: see `add`; then nothing is generated.
        """
        asked = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        if len(asked) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, but {len(asked)} sampling parameters")
        samples = self.add_all(prompts, asked)
        gathered = [Gathered(s, each) for s, each in zip(samples, asked, strict=True)]
        place = {id(sample): i for i, each in enumerate(samples) for sample in each}
        left = sum(map(len, samples))
        while left:
            for update, logprobs in self.step():
                index = place.get(id(update.sequence))
                if index is None:
                    continue
                tokens = gathered[index].push(update, logprobs)
                left -= update.finish_reason is not None
                if gathered[index].prompt_logprobs is None:
                    gathered[index].prompt_logprobs = self.prompt_logprobs(update.sequence.request.id)
                chosen = asked[index].samples == asked[index].n and not update.sequence.index
                if on_tokens is not None and chosen and tokens:
                    on_tokens(index, tokens)
        return [each.completions() for each in gathered]
