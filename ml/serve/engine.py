"""The engine: requests in, completions out, with everything that runs batched step after step."""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence

from absl import logging
from jaxtyping import PyTree

from ml.errors import UserError
from ml.models import TransformerConfig
from ml.serve.completion import Completion, Gathered, token_logprobs
from ml.serve.constrained import ConstrainedSamples
from ml.serve.engine_config import EngineConfig
from ml.serve.grammar import Grammars
from ml.serve.runner import Results, Runner
from ml.serve.sampling import SamplingParams, TokenLogprobs
from ml.serve.scheduling.config import SchedulerConfig
from ml.serve.scheduling.policies import Fifo
from ml.serve.scheduling.request import FinishReason, Request
from ml.serve.scheduling.request import Sequence as Sample
from ml.serve.scheduling.scheduler import Scheduler
from ml.serve.scheduling.schedules import make_policy
from ml.serve.scheduling.statistics import Load, Statistics
from ml.serve.scheduling.step import Row, Update

# What `Engine.step` says of a sample: its new tokens, and their log-probabilities if they are needed.
News = tuple[Update, list[TokenLogprobs] | None]


@dataclasses.dataclass
class _Asked:
    """A request that is not forgotten, and what is known of its prompt so far."""

    sampling: SamplingParams
    samples: list[Sample]
    prompt_logprobs: list[TokenLogprobs | None] | None


class Engine:
    """Continues prompts with one model: continuous batching over a paged cache that shares prefixes.

    A request can be added at any time (`add`); `step` advances all that run and says what is new. `generate` does both
    for a list of prompts. One thread at a time.
    """

    def __init__(
        self,
        config: TransformerConfig,
        params: PyTree,
        engine: EngineConfig = EngineConfig(),
        *,
        stop_ids: Iterable[int] = (),
        grammars: Grammars | None = None,
    ):
        """Allocates the cache; ``params`` are kept as they are.

        Args:
          config: the architecture.
          params: its parameters.
          engine: how much runs at once.
          stop_ids: tokens that end every text, such as the tokenizer's end of text.
          grammars: compiles `SamplingParams.structured_output`; ``None``: requests cannot ask for it.
        """
        longest = config.max_length if engine.max_length is None else engine.max_length
        if longest > config.max_length:
            raise UserError(f"max_length={longest} exceeds the model's longest sequence, {config.max_length}: lower it")
        tokens = engine.max_running * longest if engine.cache_tokens is None else engine.cache_tokens
        pages = -(-tokens // engine.page_size)
        self.config, self.engine = config, engine
        self._stop_ids = frozenset(stop_ids)
        planned = engine.schedule == "planned"
        # A plan comes with the job that it is for.
        policy = Fifo() if planned else make_policy(engine.schedule, [], engine.page_size)
        self._scheduler = Scheduler(
            SchedulerConfig(
                pages=pages,
                page_size=engine.page_size,
                token_budget=engine.token_budget,
                max_running=engine.max_running,
                decode_steps=engine.decode_steps,
                speculate=engine.speculate,
                speculate_ngram=engine.speculate_ngram,
                max_length=longest,
                reserve="expected" if planned else "prompt",
            ),
            policy,
        )
        self._runner = Runner(config, params, engine, pages=pages, max_length=longest)
        self._in_flight: collections.deque[Results] = collections.deque()
        self._asked: dict[str, _Asked] = {}
        self._ended: list[str] = []
        self._begun: dict[int, Sample] = {}
        self._failures: list[News] = []
        self._constrained = ConstrainedSamples(grammars)
        self._added = 0

    @property
    def statistics(self) -> Statistics:
        """Counts since the beginning."""
        self._scheduler.statistics.compilations = self._runner.compilations
        return self._scheduler.statistics

    @property
    def unfinished(self) -> bool:
        """Whether `step` has anything to do."""
        return self._scheduler.unfinished or bool(self._in_flight)

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
        return self._runner.warm_up(samplings, threads)

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
        if self.engine.schedule == "planned" and not self._scheduler.unfinished:
            self._scheduler.use(Fifo())  # the last job's plan has had its use
        return self._queue(self._request(prompt, sampling, request_id, priority, salt), sampling)

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
        samples: list[list[Sample]] = []
        try:
            for prompt, sampling, name in zip(prompts, samplings, ids, strict=True):
                requests.append(self._request(prompt, sampling, name, 0, ""))
            if self.engine.schedule == "planned" and not self._scheduler.unfinished:
                self._scheduler.use(make_policy("planned", requests, self.engine.page_size))
            for request, sampling in zip(requests, samplings, strict=True):
                samples.append(self._queue(request, sampling))
        except UserError as error:
            number = len(samples) if len(requests) == len(prompts) else len(requests)
            for added in samples:
                self.cancel(added[0].request.id)
            raise UserError(f"prompt {number}: {error}") from error
        return samples

    @property
    def load(self) -> Load:
        """What runs now."""
        scheduler = self._scheduler
        pool = scheduler.memory.pool
        return Load(len(scheduler.running), len(scheduler.waiting), scheduler.memory.held, pool.total)

    def cancel(self, request_id: str, index: int | None = None) -> list[Update]:
        """Ends a request, or one sample of it; the next step has its pages.

        An id that is not known (any more) is no error.
        """
        return self._forget_later(self._scheduler.cancel(request_id, index=index))

    def reset(self) -> None:
        """Ends all requests and makes the cache anew: after a step failed, nothing on the device is to be trusted."""
        for name in list(self._asked):
            self.cancel(name)
        self._in_flight.clear()
        self._asked.clear()
        self._begun.clear()
        self._ended.clear()
        self._failures.clear()
        self._scheduler.reset()
        self._runner.reset()

    def prompt_logprobs(self, request_id: str) -> list[TokenLogprobs | None] | None:
        """Log-probabilities of a prompt's tokens, if they were asked for.

        They are complete when a sample has its first token, and are forgotten at the first `step` after its last.
        """
        return self._asked[request_id].prompt_logprobs

    def step(self) -> list[News]:
        """Sends the next step to the device and takes in the results of the one before it, while the device works.

        If some that run speculate, first the results: steps with half of them, by turns, would cost more than a wait.

        Returns:
          What is new of every sample, with log-probabilities of the new tokens if they were asked for.
        """
        for name in self._ended:
            if name in self._asked and all(sample.done for sample in self._asked[name].samples):
                del self._asked[name]
        self._ended.clear()
        news = self._take() if self._in_flight and self._scheduler.awaits else []
        step = self._scheduler.schedule()
        if step is not None:
            for row in step.rows:
                if self._begun.get(row.slot) is not row.sequence or not row.number:
                    self._begin(row)
            results = self._runner.run(step, self._constrained.allowed(step))
            self._in_flight.append(results)
            for row, error in results.failed:
                self._fail(row.sequence, error)
        if self._in_flight and (step is None or len(self._in_flight) > 1):
            news += self._take()
        failures, self._failures = self._failures, []
        return news + failures

    def _take(self) -> list[News]:
        """Takes in the results of the earliest step under way."""
        results = self._in_flight.popleft()
        updates = self._scheduler.on_sampled(results.step, results.drawn())
        whole, failed = self._constrained.follow(updates)
        updates = self._forget_later(updates + [self._scheduler.finish(s, FinishReason.STOP) for s in whole])
        for sample, error in failed:
            self._fail(sample, error)
        self._note_prompts(results)
        rows = {id(row.sequence): i for i, row in enumerate(results.step.rows)}
        return [(update, self._logprobs(results, rows[id(update.sequence)], update)) for update in updates]

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

    def _request(
        self, prompt: Sequence[int], sampling: SamplingParams, request_id: str | None, priority: int, salt: str
    ) -> Request:
        name = f"{self._added}" if request_id is None else request_id
        if not prompt:
            raise UserError(f"request {name!r}: prompt: is empty; begin it with the beginning-of-text token")
        vocab = self.config.vocab_size
        if not 0 <= min(prompt) <= max(prompt) < vocab:
            raise UserError(
                f"request {name!r}: prompt: holds token ids up to {max(prompt)}, but the model has "
                f"{vocab} embeddings; use the tokenizer it was trained with"
            )
        if sampling.logit_bias and max(sampling.logit_bias) >= vocab:
            raise UserError(
                f"request {name!r}: logit_bias: names token {max(sampling.logit_bias)}, but the model has {vocab}; "
                "leave it out"
            )
        self._added += 1
        return Request(
            id=name,
            prompt=prompt,
            max_tokens=sampling.max_tokens,
            n=sampling.samples,
            priority=priority,
            stop_ids=set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else self._stop_ids),
            salt=salt,
            reuse_prefix=sampling.prompt_logprobs is None,
            token_by_token=sampling.structured_output is not None,
            speculate=sampling.speculates,
        )

    def _queue(self, request: Request, sampling: SamplingParams) -> list[Sample]:
        matcher = self._constrained.compile(request, sampling.structured_output)
        samples = self._scheduler.add(request)
        self._constrained.begin(samples, matcher)
        wanted = sampling.prompt_logprobs is not None
        self._asked[request.id] = _Asked(sampling, samples, [None] * len(request.tokens) if wanted else None)
        return samples

    def _begin(self, row: Row) -> None:
        sample = row.sequence
        self._begun[row.slot] = sample
        try:
            sampling = self._asked[sample.request.id].sampling
            sampling = dataclasses.replace(sampling, seed=(sampling.seed + sample.index) % 2**32)
            self._runner.begin(row.slot, sampling, sample.tokens, len(sample.request.tokens))
        except Exception as error:  # of this request alone, whatever it is
            self._fail(sample, error)
            self._runner.begin(row.slot, SamplingParams(temperature=0.0), sample.tokens, len(sample.request.tokens))

    def _fail(self, sample: Sample, error: Exception) -> None:
        """Ends a request with which something went wrong. What the step at hand computes of it nobody reads."""
        if sample.done:
            return
        name = sample.request.id
        logging.error("request %r failed: %r", name, error, exc_info=error)
        self._scheduler.statistics.failed += 1
        updates = self._forget_later(self._scheduler.cancel(name, FinishReason.FAILED))
        self._failures += [(update, None) for update in updates]

    def _forget_later(self, updates: list[Update]) -> list[Update]:
        self._ended += [update.sequence.request.id for update in updates if update.finish_reason is not None]
        self._constrained.forget(updates)
        return updates

    def _note_prompts(self, results: Results) -> None:
        if results.prompt_logprobs is None:
            return
        begin, given = 0, results.prompt_logprobs.on_host()
        for row in results.step.rows:
            asked = self._asked.get(row.sequence.request.id)
            if asked is not None and asked.prompt_logprobs is not None and not row.sequence.index:
                for j in range(min(row.fed, len(asked.prompt_logprobs) - row.start - 1)):
                    entry = token_logprobs(given, (begin + j,), asked.sampling.prompt_logprobs or 0)
                    asked.prompt_logprobs[row.start + j + 1] = entry
            begin += row.fed

    def _logprobs(self, results: Results, row: int, update: Update) -> list[TokenLogprobs] | None:
        wanted = self._asked[update.sequence.request.id].sampling.ranked
        given = results.given
        if wanted is None or given is None:
            return None
        return [token_logprobs(given, results.place(row, i), wanted) for i in range(len(update.tokens))]
