"""The engine: requests in, completions out, with everything that runs batched step after step."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ml.errors import UserError
from ml.models import Transformer, TransformerConfig
from ml.serve.completion import Completion
from ml.serve.engine_config import EngineConfig
from ml.serve.runner import Results, Runner, RunnerConfig
from ml.serve.sampling import SamplingParams, TokenLogprobs
from ml.serve.scheduling.config import SchedulerConfig
from ml.serve.scheduling.request import FinishReason, Request
from ml.serve.scheduling.request import Sequence as Sample
from ml.serve.scheduling.scheduler import Scheduler
from ml.serve.scheduling.schedules import make_policy
from ml.serve.scheduling.statistics import Load
from ml.serve.scheduling.step import Update
from pallas_kernels.paged_attention.core import resolve
from pallas_kernels.paged_attention.segments import ordered_block
from pallas_kernels.shared_prefix_attention import Crossover, Shapes, SharedPrefixPlan, crossover, make_plan


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
    ):
        """Allocates the cache; ``params`` are kept as they are.

        Args:
          config: the architecture.
          params: its parameters.
          engine: how much runs at once.
          stop_ids: tokens that end every text, such as the tokenizer's end of text.
        """
        longest = config.max_length if engine.max_length is None else engine.max_length
        if longest > config.max_length:
            raise UserError(f"max_length={longest} exceeds the model's longest sequence, {config.max_length}: lower it")
        tokens = engine.max_running * longest if engine.cache_tokens is None else engine.cache_tokens
        pages = -(-tokens // engine.page_size)
        self.config, self.engine = config, engine
        self._longest = longest
        self._stop_ids = frozenset(stop_ids)
        self._scheduler = Scheduler(
            SchedulerConfig(
                pages=pages,
                page_size=engine.page_size,
                token_budget=engine.token_budget,
                max_running=engine.max_running,
                decode_steps=engine.decode_steps,
                max_length=longest,
            ),
            make_policy("prefix" if engine.schedule == "prefix" else "fifo", [], engine.page_size),
        )
        model = Transformer(config, dtype=engine.dtype)
        self._runner = Runner(
            model,
            params,
            RunnerConfig(
                pages=pages,
                page_size=engine.page_size,
                max_running=engine.max_running,
                max_length=longest,
                token_budget=engine.token_budget,
                cache_dtype=engine.cache_dtype,
                invariant=engine.invariant,
                implementation=engine.implementation,
            ),
        )
        self._in_flight: collections.deque[Results] = collections.deque()
        self._sampling: dict[str, SamplingParams] = {}
        self._begun: dict[int, Sample] = {}
        self._added = 0

    @property
    def statistics(self) -> Any:
        """Counts since the beginning: see `ml.serve.scheduling.statistics.Statistics`."""
        return self._scheduler.statistics

    @property
    def unfinished(self) -> bool:
        """Whether `step` has anything to do."""
        return self._scheduler.unfinished or bool(self._in_flight)

    def add(self, prompt: Sequence[int], sampling: SamplingParams, request_id: str | None = None) -> list[Sample]:
        """Queues a request; returns its ``sampling.n`` samples, which `step` speaks of.

        Raises:
          UserError: an empty prompt, an id outside the vocabulary, or more tokens than the model or the cache takes.
        """
        name = f"{self._added}" if request_id is None else request_id
        if not prompt:
            raise UserError(f"request {name!r}: prompt: is empty; begin it with the beginning-of-text token")
        if not 0 <= min(prompt) <= max(prompt) < self.config.vocab_size:
            raise UserError(
                f"request {name!r}: prompt: holds token ids up to {max(prompt)}, but the model has "
                f"{self.config.vocab_size} embeddings; use the tokenizer it was trained with"
            )
        self._added += 1
        stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else self._stop_ids)
        samples = self._scheduler.add(
            Request(id=name, prompt=prompt, max_tokens=sampling.max_tokens, n=sampling.n, stop_ids=stops)
        )
        self._sampling[name] = sampling
        return samples

    @property
    def load(self) -> Load:
        """What runs now."""
        scheduler = self._scheduler
        pool = scheduler.memory.pool
        return Load(len(scheduler.running), len(scheduler.waiting), scheduler.memory.held, pool.total)

    def cancel(self, request_id: str, index: int | None = None) -> list[Update]:
        """Ends a request, or one sample of it; the next step has its pages."""
        return self._scheduler.cancel(request_id, index=index)

    def reset(self) -> None:
        """Ends all requests and makes the cache anew: after a step failed, nothing on the device is to be trusted."""
        for name in list(self._sampling):
            self.cancel(name)
        self._in_flight.clear()
        self._sampling.clear()
        self._begun.clear()
        self._scheduler.reset()
        self._runner.reset()

    def step(self) -> list[tuple[Update, list[TokenLogprobs] | None]]:
        """Sends the next step to the device and takes in the results of the one before it, while the device works.

        Returns:
          What is new of every sample, with log-probabilities of the new tokens if they were asked for.
        """
        step = self._scheduler.schedule()
        if step is not None:
            for row in step.rows:
                if self._begun.get(row.slot) is not row.sequence or not row.number:
                    self._begin(row.slot, row.sequence)
            self._in_flight.append(self._runner.run(step, self._plan))
        if not self._in_flight or (step is not None and len(self._in_flight) < 2):
            return []
        results = self._in_flight.popleft()
        # Before the updates, since a sample that ends forgets its place.
        updates = self._scheduler.on_sampled(results.step, results.drawn())
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
          on_tokens: called with a prompt's index and the new tokens of its first sample as they come.

        Raises:
          UserError: see `add`; then nothing is generated.
        """
        requests = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        if len(requests) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, but {len(requests)} sampling parameters")
        samples: list[list[Sample]] = []
        try:
            for prompt, request in zip(prompts, requests, strict=True):
                samples.append(self.add(prompt, request))
        except UserError as error:
            for added in samples:
                self.cancel(added[0].request.id)
            raise UserError(f"prompt {len(samples)}: {error}") from error
        place = {id(sample): (i, sample.index) for i, each in enumerate(samples) for sample in each}
        given: dict[int, list[TokenLogprobs]] = {id(s): [] for each in samples for s in each}
        while not all(sample.done for each in samples for sample in each):
            for update, logprobs in self.step():
                index, number = place.get(id(update.sequence), (None, None))
                tokens = list(update.tokens)
                if update.finish_reason is FinishReason.STOP:
                    tokens = tokens[:-1]
                if logprobs is not None and index is not None:
                    given[id(update.sequence)] += logprobs[: len(tokens)]
                if on_tokens is not None and number == 0 and index is not None and tokens:
                    on_tokens(index, tokens)
        return [[self._completion(s, given[id(s)]) for s in each] for each in samples]

    def _completion(self, sample: Sample, logprobs: list[TokenLogprobs]) -> Completion:
        tokens = sample.output
        if sample.finish_reason is FinishReason.STOP:
            tokens = tokens[:-1]
        asked = self._sampling[sample.request.id].logprobs is not None
        assert sample.finish_reason is not None
        return Completion(tokens, cast(Any, sample.finish_reason.value), logprobs if asked else None)

    def _begin(self, slot: int, sample: Sample) -> None:
        sampling = self._sampling[sample.request.id]
        sampling = dataclasses.replace(sampling, seed=(sampling.seed + sample.index) % 2**32)
        self._runner.begin(slot, sampling, sample.tokens, len(sample.request.tokens))
        self._begun[slot] = sample

    def _logprobs(self, results: Results, row: int, update: Update) -> list[TokenLogprobs] | None:
        wanted = self._sampling[update.sequence.request.id].logprobs
        if wanted is None or results.logprobs is None:
            return None
        given = []
        for each in results.logprobs[: len(update.tokens)]:
            top = {int(t): float(p) for t, p in zip(each.top_token[row, :wanted], each.top[row, :wanted], strict=True)}
            given.append(TokenLogprobs(float(each.drawn[row]), int(each.rank[row]), top))
        return given

    def _plan(self, block_table: Any, lengths: Any, starts: Any, rows: int) -> SharedPrefixPlan | None:
        if self.engine.share == "never":
            return None
        page_size = self.engine.page_size
        plan = make_plan(
            block_table,
            lengths,
            starts,
            page_size=page_size,
            rows=rows,
            crossover=self._crossover,
            granularity=ordered_block(page_size) if self.engine.invariant else None,
        )
        return plan if plan.levels else None

    @functools.cached_property
    def _crossover(self) -> Crossover:
        if self.engine.share == "always":
            return Crossover.always()
        config, dtype = self.config, np.dtype(self.engine.dtype)
        cache = self._runner.cache
        query = jnp.zeros((1, config.num_heads, config.head_dim), dtype)
        return crossover(
            Shapes(
                heads=config.num_heads,
                kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                page_size=self.engine.page_size,
                dtype=dtype.name,
                cache_dtype=cache.key.dtype.name,
                implementation=resolve(query, cache, True, self.engine.implementation),
            )
        )
