"""``/v1/batches``: files of requests, answered in the background."""

from typing import Annotated, Any

from fastapi import APIRouter, Query

from ml.serve.api.batch_jobs import BatchJobs
from ml.serve.api.file_store import page
from ml.serve.api.protocol import BatchBody


def batches(jobs: BatchJobs) -> APIRouter:
    """All endpoints of batches."""
    router = APIRouter(tags=["batches"])

    @router.post("/v1/batches")
    async def create_batch(body: BatchBody) -> dict[str, Any]:
        return jobs.start(body).card

    @router.get("/v1/batches")
    async def list_batches(after: str | None = None, limit: Annotated[int, Query(ge=1, le=100)] = 20) -> dict[str, Any]:
        return page([job.card for job in jobs.all()], after, limit)

    @router.get("/v1/batches/{batch_id}")
    async def retrieve_batch(batch_id: str) -> dict[str, Any]:
        return jobs.get(batch_id).card

    @router.post("/v1/batches/{batch_id}/cancel")
    async def cancel_batch(batch_id: str) -> dict[str, Any]:
        return jobs.cancel(batch_id).card

    return router
