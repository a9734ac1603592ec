"""An engine without a model: what a request gets depends on its prompt and seed alone, and comes in small pieces."""

import random
import time

from ml.errors import UserError
from ml.serve.engine_config import EngineConfig
from ml.serve.sampling import TokenLogprobs
from ml.serve.scheduling.request import FinishReason, Request, Sequence
from ml.serve.scheduling.statistics import Statistics
from ml.serve.scheduling.step import Update


class ScriptedEngine:
    most_prompt = 50

    def __init__(self, tokens=range(65, 91), end=0, running=5, fail=(), interrupt_after=None, schedule="fifo"):
        """Draws from ``tokens``; ``end`` stops a text; requests whose prompts hold a token of ``fail`` fail."""
        self.engine, self.statistics = EngineConfig(schedule=schedule), Statistics()
        self._tokens, self._end, self._running, self._fail = list(tokens), end, running, set(fail)
        self._sequences, self._sampling = [], {}
        self._interrupt_after = interrupt_after
        self.cancelled, self.most_known = [], 0

    @property
    def unfinished(self):
        return bool(self._sequences)

    def add(self, prompt, sampling, request_id):
        if len(prompt) > self.most_prompt:
            raise UserError(f"request {request_id!r}: too long for the cache")
        request = Request(request_id, prompt, sampling.max_tokens, sampling.samples)
        self._sampling[request_id] = sampling
        new = [Sequence(request, index) for index in range(sampling.samples)]
        self._sequences += new
        self.most_known = max(self.most_known, len(self._sequences))
        return new

    def add_all(self, prompts, samplings, request_ids):
        self.planned = len(prompts)
        if any(len(prompt) > self.most_prompt for prompt in prompts):
            raise UserError("prompt 0: one is too long for the cache")
        return [self.add(*each) for each in zip(prompts, samplings, request_ids, strict=True)]

    def prompt_logprobs(self, request_id):
        assert self._sampling[request_id].prompt_logprobs is not None
        prompt = next(s for s in self._sequences if s.request.id == request_id).request.tokens
        return [None, *(TokenLogprobs(-0.125 * i, 2, {65: -0.0625}) for i in range(1, len(prompt)))]

    def cancel(self, request_id, index=None):
        gone = [s for s in self._sequences if s.request.id == request_id and index in (None, s.index)]
        self._sequences = [s for s in self._sequences if s not in gone]
        self.cancelled += gone
        return [Update(s, (), FinishReason.CANCELLED) for s in gone]

    def step(self):
        if self._interrupt_after is not None:
            self._interrupt_after -= 1
            if self._interrupt_after < 0:
                raise KeyboardInterrupt
        news = []
        for sequence in self._sequences[: self._running]:
            sampling = self._sampling[sequence.request.id]
            if not sequence.output:
                self.statistics.prompt += len(sequence.request.tokens)
                self.statistics.cached += 1
                sequence.cached = 1
            rng = random.Random(f"{list(sequence.tokens)} {sampling.seed + sequence.index}")
            token = rng.choice(self._tokens)
            reason = None
            if self._fail & set(sequence.request.tokens):
                news.append((Update(sequence, (), FinishReason.FAILED), None))
                continue
            if rng.random() < 0.02:
                token, reason = self._end, FinishReason.STOP
            sequence.tokens.append(token)
            if reason is None and len(sequence.output) == sequence.request.max_tokens:
                reason = FinishReason.LENGTH
            logprobs = None
            if sampling.ranked is not None:
                logprobs = [TokenLogprobs(-0.5 - sequence.index % 2, 1, {66: -0.25, token: -0.5})]
            news.append((Update(sequence, (token,), reason), logprobs))
        ended = {id(update.sequence) for update, _ in news if update.finish_reason}
        self._sequences = [s for s in self._sequences if id(s) not in ended]
        return news


class SlowEngine(ScriptedEngine):
    """Takes the place of `ml.serve.Engine`, and some time for each step."""

    def __init__(self, config, params, engine, *, stop_ids, grammars=None, mesh=None):
        super().__init__(end=next(iter(stop_ids)), running=8, schedule=engine.schedule)

    def step(self):
        time.sleep(0.005)
        return super().step()
