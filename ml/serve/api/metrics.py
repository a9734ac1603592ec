"""Prometheus metrics, under vLLM's names with a prefix of ours."""

from collections.abc import Callable, Iterator

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from ml.serve.api.driver import Driver, Observer
from ml.serve.api.stream import Stream
from ml.serve.front import Front

_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_WHOLE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics(Observer):
    """Of one server, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = prometheus_client.CollectorRegistry()
        self._first = self._histogram("time_to_first_token_seconds", "From arrival to a sample's first token.", _FIRST)
        self._between = self._histogram("inter_token_latency_seconds", "Between a sample's tokens.", _BETWEEN)
        self._whole = self._histogram("e2e_request_latency_seconds", "From arrival to a request's end.", _WHOLE)
        self._finished = prometheus_client.Counter(
            "megabatch_request", "Requests that ended, by the reason.", ["finished_reason"], registry=self._registry
        )
        self._failures = prometheus_client.Counter(
            "megabatch_engine_failures", "Steps that failed as a whole.", registry=self._registry
        )

    def watch(self, engine: Front, driver: Driver) -> None:
        """Reads the state of these whenever metrics are asked for."""
        self._registry.register(_State(engine, driver))

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        return prometheus_client.generate_latest(self._registry)

    def tokens(self, stream: Stream, count: int, seconds: float, first: bool) -> None:
        """See `Observer`."""
        if first:
            self._first.observe(seconds)
            return
        for _ in range(count):
            self._between.observe(seconds / count)

    def finished(self, stream: Stream, reason: str, seconds: float) -> None:
        """See `Observer`."""
        self._finished.labels(reason).inc()
        self._whole.observe(seconds)

    def failed(self, error: Exception) -> None:
        """See `Observer`."""
        self._failures.inc()

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> prometheus_client.Histogram:
        return prometheus_client.Histogram(f"megabatch_{name}", text, buckets=buckets, registry=self._registry)


class _State(Collector):
    """Numbers that the engine keeps anyway."""

    def __init__(self, engine: Front, driver: Driver):
        self._engine, self._driver = engine, driver

    def collect(self) -> Iterator[Metric]:
        """Reads them."""
        load, counts = self._engine.load, self._engine.statistics
        gauge: Callable[..., Metric] = GaugeMetricFamily
        counter: Callable[..., Metric] = CounterMetricFamily
        yield gauge("megabatch_num_requests_running", "Samples that run.", load.running)
        waiting = max(load.waiting, self._driver.unfinished - load.running)
        yield gauge("megabatch_num_requests_waiting", "Samples that wait.", waiting)
        yield gauge("megabatch_kv_cache_usage_perc", "Of the cache, what sequences hold.", load.held_pages / load.pages)
        yield counter("megabatch_prompt_tokens", "Of admitted prompts.", counts.prompt)
        yield counter("megabatch_prefix_cache_queries", "Prompt tokens looked up in the cache.", counts.prompt)
        yield counter("megabatch_prefix_cache_hits", "Prompt tokens found in the cache.", counts.cached)
        yield counter("megabatch_generation_tokens", "Drawn.", counts.decoded)
        drafted, accepted = counts.drafted, counts.accepted
        yield counter("megabatch_spec_decode_num_draft_tokens", "Guessed, and fed to the model.", drafted)
        yield counter("megabatch_spec_decode_num_accepted_tokens", "Of those, the ones that were right.", accepted)
        yield counter("megabatch_num_preemptions", "Sequences that lost their pages.", counts.preemptions)
        yield counter("megabatch_engine_steps", "Dispatches to the device.", counts.steps)
        yield counter("megabatch_compilations", "Programs compiled while requests waited.", counts.compilations)
