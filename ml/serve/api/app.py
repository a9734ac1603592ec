"""The application: an engine and its thread behind OpenAI's paths."""

import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI

from ml.serve.api import errors
from ml.serve.api.batch_jobs import BatchJobs
from ml.serve.api.batches import batches
from ml.serve.api.completions import completions
from ml.serve.api.driver import Driver
from ml.serve.api.embedder import Embedder
from ml.serve.api.embeddings import embeddings
from ml.serve.api.file_store import FileStore
from ml.serve.api.files import files
from ml.serve.api.gate import Gate
from ml.serve.api.health import health
from ml.serve.api.metrics import Metrics
from ml.serve.api.models import models
from ml.serve.api.server import Server
from ml.serve.api.settings import ServerSettings
from ml.serve.api.tokenizing import tokenizing
from ml.serve.front import Front
from ml.serve.text import ServedModel


def create_app(model: ServedModel, engine: Front, settings: ServerSettings, *, capacity: int) -> FastAPI:
    """Puts the server together; the engine's thread runs from here on.

    Args:
      model: what ``engine`` runs.
      engine: belongs to the application from now on.
      settings: limits and manners.
      capacity: see `Driver`.

    Returns:
      The application. ``state.driver`` is the thread; ``await state.drain(seconds)`` takes no more requests, waits for
      those that run, and tells whether all ended in time.
    """
    metrics = Metrics()
    driver = Driver(engine, capacity=capacity, observer=metrics)
    metrics.watch(engine, driver)
    embedder = Embedder(
        model.config, model.params, pooling=settings.pooling, dtype=engine.engine.dtype, mesh=model.mesh
    )
    server = Server(model, driver, embedder, settings, metrics)
    store = FileStore()
    jobs = BatchJobs(server, store)

    async def drain(seconds: float) -> bool:
        await jobs.close()
        return await driver.drain(seconds)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await drain(0)
        store.close()

    app = FastAPI(title="Megabatch", description=__doc__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.driver, app.state.drain = driver, drain
    for router in (
        completions(server),
        embeddings(server),
        models(server),
        files(store, settings),
        batches(jobs),
        tokenizing(server),
        health(server),
    ):
        app.include_router(router)
    app.add_middleware(Gate, settings=settings)
    errors.install(app, settings.retry_after)
    driver.start()
    return app
