"""Several engines behind one front: a replica of the model on each slice of a mesh, and no word between them."""

import dataclasses
import time
from collections.abc import Iterable, Sequence

from jax.sharding import Mesh
from jaxtyping import PyTree

from ml.errors import UserError
from ml.models import TransformerConfig
from ml.serve.engine import Engine
from ml.serve.engine_config import EngineConfig
from ml.serve.front import Front, News
from ml.serve.grammar import Grammars
from ml.serve.placement import replica_meshes
from ml.serve.sampling import SamplingParams, TokenLogprobs
from ml.serve.scheduling.request import Request
from ml.serve.scheduling.request import Sequence as Sample
from ml.serve.scheduling.routing import Router, deal
from ml.serve.scheduling.statistics import Load, Statistics
from ml.serve.scheduling.step import Update

_LOOK_AGAIN = 1e-4  # seconds


def make_engine(
    config: TransformerConfig,
    params: PyTree,
    engine: EngineConfig = EngineConfig(),
    *,
    stop_ids: Iterable[int] = (),
    grammars: Grammars | None = None,
    mesh: Mesh | None = None,
) -> Front:
    """The engine for a mesh: one, or a replica for each slice of its ``data`` axis; arguments are those of `Engine`."""
    stop_ids = tuple(stop_ids)
    meshes = [mesh] if mesh is None else replica_meshes(mesh)
    engines = [Engine(config, params, engine, stop_ids=stop_ids, grammars=grammars, mesh=each) for each in meshes]
    return engines[0] if len(engines) == 1 else ReplicatedEngine(engines)


class ReplicatedEngine(Front):
    """Replicas with requests, scheduler, cache and prefix tree of their own.

    A request goes to the replica that holds most of its prompt (`ml.serve.scheduling.routing`), and stays there. What a
    request draws does not depend on where.
    """

    def __init__(self, engines: Sequence[Engine]):
        """Takes over engines that are alike and have nothing to do."""
        self.engines = list(engines)
        self.config, self.engine = engines[0].config, engines[0].engine
        self._slack = engines[0].load.pages * self.engine.page_size // 4
        self._router = self._new_router()
        self._samples: dict[str, list[Sample]] = {}
        self._ended: list[str] = []  # requests of which a sample has
        self._statistics = Statistics()

    @property
    def statistics(self) -> Statistics:
        """See `Front.statistics`; those of all replicas together."""
        self._count()
        return self._statistics

    @property
    def unfinished(self) -> bool:
        """See `Front.unfinished`."""
        return any(engine.unfinished for engine in self.engines)

    @property
    def load(self) -> Load:
        """See `Front.load`; that of all replicas together."""
        loads = [dataclasses.astuple(engine.load) for engine in self.engines]
        return Load(*map(sum, zip(*loads, strict=True)))

    def warm_up(self, samplings: Iterable[SamplingParams] = (SamplingParams(),), *, threads: int | None = None) -> int:
        """See `Front.warm_up`; each replica has its own programs."""
        samplings = tuple(samplings)
        return sum(engine.warm_up(samplings, threads=threads) for engine in self.engines)

    def request(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        request_id: str | None = None,
        priority: int = 0,
        salt: str = "",
    ) -> Request:
        """See `Front.request`."""
        return self.engines[0].request(prompt, sampling, request_id, priority, salt)

    def queue(self, request: Request, sampling: SamplingParams) -> list[Sample]:
        """See `Front.queue`."""
        self._forget_ended()
        replica = self._router.where(request.id)  # which then refuses another of this name
        if replica is None:
            replica = self._router.choose(request, [engine.cached(request) for engine in self.engines])
        samples = self.engines[replica].queue(request, sampling)
        self._note(request, replica, samples)
        return samples

    def queue_all(
        self, requests: Sequence[Request], samplings: Sequence[SamplingParams], numbers: Sequence[int] | None = None
    ) -> list[list[Sample]]:
        """See `Front.queue_all`; each replica gets whole groups of requests that share a prefix, as far as it goes."""
        self._forget_ended()
        numbers = range(len(requests)) if numbers is None else numbers
        names = set(self._samples)
        for number, request in zip(numbers, requests, strict=True):
            if request.id in names:
                raise UserError(f"prompt {number}: request {request.id!r}: id: is in use by another; choose another")
            names.add(request.id)
        samples: list[list[Sample]] = [[] for _ in requests]
        done: list[int] = []
        for replica, part in enumerate(deal(requests, self.engine.page_size, self._router.loads)):
            try:
                queued = self.engines[replica].queue_all(
                    [requests[i] for i in part], [samplings[i] for i in part], [numbers[i] for i in part]
                )
            except UserError:
                for i in done:
                    self.cancel(requests[i].id)
                raise
            for i, each in zip(part, queued, strict=True):
                samples[i] = each
                self._note(requests[i], replica, each)
            done += part
        return samples

    def cancel(self, request_id: str, index: int | None = None) -> list[Update]:
        """See `Front.cancel`."""
        replica = self._router.where(request_id)
        if replica is None:
            return []
        return self._heard(self.engines[replica].cancel(request_id, index))

    def reset(self) -> None:
        """See `Front.reset`."""
        for engine in self.engines:
            engine.reset()
        self._router = self._new_router()
        self._samples.clear()
        self._ended.clear()

    def prompt_logprobs(self, request_id: str) -> list[TokenLogprobs | None] | None:
        """See `Front.prompt_logprobs`."""
        replica = self._router.where(request_id)
        assert replica is not None, f"request {request_id!r} is not known"
        return self.engines[replica].prompt_logprobs(request_id)

    def step(self) -> list[News]:
        """See `Front.step`: all devices have work before one is waited for, and none waits for a slower one."""
        self._forget_ended()
        for engine in self.engines:
            if not engine.due:  # it has no more than one step before it
                engine.send()
        news = [each for engine in self.engines if not engine.due for each in engine.receive()]
        due = [engine for engine in self.engines if engine.due]
        while len(due) > 1 and not any(engine.ready for engine in due):
            time.sleep(_LOOK_AGAIN)
        for engine in due:
            if len(due) == 1 or engine.ready:
                news += engine.receive()
        self._heard([update for update, _ in news])
        self._count()
        return news

    def _note(self, request: Request, replica: int, samples: list[Sample]) -> None:
        self._router.note(request, replica)
        self._samples[request.id] = samples

    def _heard(self, updates: list[Update]) -> list[Update]:
        self._ended += [update.sequence.request.id for update in updates if update.finish_reason is not None]
        return updates

    def _forget_ended(self) -> None:
        for name in self._ended:
            if name in self._samples and all(sample.done for sample in self._samples[name]):
                del self._samples[name]
                self._router.ended(name)
        self._ended.clear()

    def _new_router(self) -> Router:
        return Router(len(self.engines), self.engine.page_size, self._slack)

    def _count(self) -> None:
        for field in dataclasses.fields(Statistics):
            total = sum(getattr(engine.statistics, field.name) for engine in self.engines)
            setattr(self._statistics, field.name, total)
