"""Whatever the application's own schema allows, and what it does not, is answered without a 500."""

import asyncio
import collections

import hypothesis
import numpy as np
import pytest
import schemathesis
from fake_engine import FakeEngine
from schemathesis import GenerationMode
from tiny_server import TinyServer

from ml.serve.api.embedder import Embedder

# Making up requests takes longer than answering them.
pytestmark = pytest.mark.slow


def fuzz(examples, seed, engine=None):
    """Sends requests that fit the schema and others that do not; returns the statuses of each operation."""
    # Short texts: they are all the same to the protocol.
    server = TinyServer(capacity=100, max_body=50_000, max_length=24, engine=engine)
    schema = schemathesis.openapi.from_asgi("/openapi.json", server.app)
    statuses = collections.defaultdict(collections.Counter)
    settings = hypothesis.settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    for found in schema.get_all_operations():
        operation = found.ok()
        for mode in GenerationMode:
            try:
                strategy = operation.as_strategy(generation_mode=mode)
            except schemathesis.errors.SchemathesisError:
                continue

            @hypothesis.seed(seed)
            @settings
            @hypothesis.given(case=strategy)
            def send(case):
                answer = case.call(timeout=300)
                statuses[case.operation.label][answer.status_code] += 1
                assert answer.status_code < 500, (case.as_curl_command(), answer.text)
                if answer.status_code >= 400:
                    assert {"message", "type", "param", "code"} == set(answer.json()["error"])

            try:
                send()
            except hypothesis.errors.Unsatisfiable:  # a path without parameters cannot be wrong
                continue
    asyncio.run(server.app.state.drain(5))
    load = server.engine.load
    assert (load.running, load.waiting, load.held_pages) == (0, 0, 0)
    return statuses


def test_requests_to_everything_find_no_500(monkeypatch):
    # Nothing is computed, and so nothing compiled.
    monkeypatch.setattr(Embedder, "embed", lambda self, texts: np.ones((len(texts), 4), np.float32))
    statuses = fuzz(examples=25, seed=1, engine=FakeEngine())
    assert len(statuses) == 18, statuses
    assert {200, 400, 404} <= set().union(*statuses.values()), statuses


def test_requests_to_a_real_engine_find_no_500():
    statuses = fuzz(examples=10, seed=2)
    assert {200, 400} <= set(statuses["POST /v1/completions"]), statuses
