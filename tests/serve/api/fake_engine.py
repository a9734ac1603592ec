"""An engine that counts instead of computing: what the driver needs, at a speed that lets thousands of requests run."""

import collections
import dataclasses
import threading
import types

from ml.errors import UserError
from ml.serve.engine_config import EngineConfig
from ml.serve.sampling import TokenLogprobs
from ml.serve.scheduling.request import FinishReason
from ml.serve.scheduling.statistics import Load, Statistics


@dataclasses.dataclass(eq=False)
class Sample:
    request: object
    index: int
    left: int
    drawn: int = 0
    cached: int = 0


class FakeEngine:
    """Every step gives each of the first ``running`` samples one token: 0, 1, 2, ...

    Attributes:
      errors: raised by the coming steps, one each (``None``: that step works).
      gate: steps wait for it.
      most: most samples that were ever unfinished.
    """

    def __init__(self, running=8, error_at_reset=None):
        self.samples: dict[str, list[Sample]] = {}
        self.running = running
        self.errors = collections.deque()
        self.fail: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.added, self.resets, self.most, self.threads = [], 0, 0, set()
        self._unfinished = 0
        self._error_at_reset = error_at_reset
        self.engine, self.statistics = EngineConfig(), Statistics()

    @property
    def unfinished(self):
        return bool(self.samples)

    @property
    def load(self):
        running = min(self._unfinished, self.running)
        return Load(running, self._unfinished - running, running, 100)

    def add(self, prompt, sampling, request_id=None):
        if not prompt:
            raise UserError("prompt: is empty")
        self.threads.add(threading.get_ident())
        request = types.SimpleNamespace(id=request_id, sampling=sampling)
        self.samples[request_id] = [Sample(request, i, sampling.max_tokens) for i in range(sampling.samples)]
        self.added.append(request_id)
        self._unfinished += sampling.samples
        self.most = max(self.most, self._unfinished)
        return self.samples[request_id]

    def cancel(self, request_id, index=None):
        self.threads.add(threading.get_ident())
        before = self.samples.pop(request_id, [])
        kept = [s for s in before if index is not None and s.index != index]
        self._unfinished -= len(before) - len(kept)
        if kept:
            self.samples[request_id] = kept
        return []

    def step(self):
        self.gate.wait(30)
        if self.errors and (error := self.errors.popleft()) is not None:
            raise error
        updates = []
        for sample in self._first():
            sample.left -= 1
            reason = None if sample.left else FinishReason.LENGTH
            if sample.request.id in self.fail:
                reason = FinishReason.FAILED
            update = types.SimpleNamespace(sequence=sample, tokens=(sample.drawn,), finish_reason=reason)
            top = sample.request.sampling.logprobs
            logprobs = None if top is None else [TokenLogprobs(-1.0, 0, {i: -1.0 - i for i in range(top)})]
            updates.append((update, logprobs))
            sample.drawn += 1
            if reason:
                self._forget(sample)
        return updates

    def reset(self):
        if self._error_at_reset is not None:
            raise self._error_at_reset
        self.samples.clear()
        self._unfinished = 0
        self.resets += 1

    def _first(self):
        found = []
        for each in self.samples.values():
            found += each
            if len(found) >= self.running:
                break
        return found[: self.running]

    def _forget(self, sample):
        self._unfinished -= 1
        kept = [s for s in self.samples[sample.request.id] if s is not sample]
        if kept:
            self.samples[sample.request.id] = kept
        else:
            del self.samples[sample.request.id]
