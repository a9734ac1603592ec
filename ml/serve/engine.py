"""The engine: requests in, completions out, with everything that runs batched step after step."""

import collections
import dataclasses
from collections.abc import Iterable, Sequence

from absl import logging
from jax.sharding import Mesh
from jaxtyping import PyTree

from ml.errors import UserError
from ml.models import TransformerConfig
from ml.serve.completion import token_logprobs
from ml.serve.constrained import ConstrainedSamples
from ml.serve.engine_config import EngineConfig
from ml.serve.front import Front, News
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


@dataclasses.dataclass
class _Asked:
    """A request that is not forgotten, and what is known of its prompt so far."""

    sampling: SamplingParams
    samples: list[Sample]
    prompt_logprobs: list[TokenLogprobs | None] | None


class Engine(Front):
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
        mesh: Mesh | None = None,
    ):
        """Allocates the cache; ``params`` are kept as they are, in their places on the mesh.

        Args:
          config: the architecture.
          params: its parameters.
          engine: how much runs at once.
          stop_ids: tokens that end every text, such as the tokenizer's end of text.
          grammars: compiles `SamplingParams.structured_output`; ``None``: requests cannot ask for it.
          mesh: devices that share the model along ``tensor``, from `ml.serve.placement.serving_mesh`; ``None``: one.

        Raises:
          UserError: ``max_length`` exceeds the model's, or the model cannot be dealt to the mesh.
        """
        if mesh is not None and mesh.shape["data"] > 1:
            raise ValueError("an engine is one replica: see ml.serve.replicated.make_engine")
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
        self._runner = Runner(config, params, engine, pages=pages, max_length=longest, mesh=mesh)
        self._in_flight: collections.deque[Results] = collections.deque()
        self._idle = True  # nothing was left to send
        self._asked: dict[str, _Asked] = {}
        self._ended: list[str] = []
        self._begun: dict[int, Sample] = {}
        self._failures: list[News] = []
        self._constrained = ConstrainedSamples(grammars)
        self._added = 0

    @property
    def statistics(self) -> Statistics:
        """See `Front.statistics`."""
        self._scheduler.statistics.compilations = self._runner.compilations
        return self._scheduler.statistics

    @property
    def unfinished(self) -> bool:
        """See `Front.unfinished`."""
        return self._scheduler.unfinished or bool(self._in_flight)

    def warm_up(self, samplings: Iterable[SamplingParams] = (SamplingParams(),), *, threads: int | None = None) -> int:
        """See `Front.warm_up`."""
        return self._runner.warm_up(samplings, threads)

    def request(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        request_id: str | None = None,
        priority: int = 0,
        salt: str = "",
    ) -> Request:
        """See `Front.request`."""
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

    def queue(self, request: Request, sampling: SamplingParams) -> list[Sample]:
        """See `Front.queue`."""
        if self.engine.schedule == "planned" and not self._scheduler.unfinished:
            self._scheduler.use(Fifo())  # the last job's plan has had its use
        return self._queue(request, sampling)

    def queue_all(
        self, requests: Sequence[Request], samplings: Sequence[SamplingParams], numbers: Sequence[int] | None = None
    ) -> list[list[Sample]]:
        """See `Front.queue_all`."""
        samples: list[list[Sample]] = []
        if self.engine.schedule == "planned" and not self._scheduler.unfinished:
            self._scheduler.use(make_policy("planned", requests, self.engine.page_size))
        try:
            for request, sampling in zip(requests, samplings, strict=True):
                samples.append(self._queue(request, sampling))
        except UserError as error:
            for added in samples:
                self.cancel(added[0].request.id)
            number = len(samples) if numbers is None else numbers[len(samples)]
            raise UserError(f"prompt {number}: {error}") from error
        return samples

    @property
    def load(self) -> Load:
        """See `Front.load`."""
        scheduler = self._scheduler
        pool = scheduler.memory.pool
        return Load(len(scheduler.running), len(scheduler.waiting), scheduler.memory.held, pool.total)

    def cached(self, request: Request) -> int:
        """Tokens of a request's prompt that are computed already."""
        return self._scheduler.memory.cached(Sample(request))

    def cancel(self, request_id: str, index: int | None = None) -> list[Update]:
        """See `Front.cancel`."""
        return self._forget_later(self._scheduler.cancel(request_id, index=index))

    def reset(self) -> None:
        """See `Front.reset`."""
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
        """See `Front.prompt_logprobs`."""
        return self._asked[request_id].prompt_logprobs

    def step(self) -> list[News]:
        """See `Front.step`.

        If some that run speculate, first the results: steps with half of them, by turns, would cost more than a wait.
        """
        self._forget_ended()
        news = self._take() if self.due else []
        self._send()
        if self._full:
            news += self._take()
        return news + self._failed()

    def send(self) -> None:
        """The first half of `step`, for one who looks after several engines: the device has its next step."""
        self._forget_ended()
        self._send()

    @property
    def due(self) -> bool:
        """Whether `receive` will take in results: no step should be sent before."""
        return self._full or (bool(self._in_flight) and self._scheduler.awaits)

    @property
    def ready(self) -> bool:
        """Whether these are here."""
        return self._in_flight[0].ready

    def receive(self) -> list[News]:
        """The second half of `step`: waits for the results that are due."""
        news = self._take() if self.due else []
        return news + self._failed()

    @property
    def _full(self) -> bool:
        """Whether more is under way than the last step that was sent; or that too, if nothing follows."""
        return len(self._in_flight) > (not self._idle)

    def _send(self) -> None:
        step = self._scheduler.schedule()
        self._idle = step is None
        if step is not None:
            for row in step.rows:
                if self._begun.get(row.slot) is not row.sequence or not row.number:
                    self._begin(row)
            results = self._runner.run(step, self._constrained.allowed(step))
            self._in_flight.append(results)
            for row, error in results.failed:
                self._fail(row.sequence, error)

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

    def _failed(self) -> list[News]:
        failures, self._failures = self._failures, []
        return failures

    def _forget_ended(self) -> None:
        for name in self._ended:
            if name in self._asked and all(sample.done for sample in self._asked[name].samples):
                del self._asked[name]
        self._ended.clear()

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
