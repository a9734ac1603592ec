"""``/v1/files``: uploads for batches, and the batches' results."""

import asyncio
import shutil
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form, Query, UploadFile
from starlette.responses import FileResponse

from ml.serve.api.errors import ApiError
from ml.serve.api.file_store import FileStore, page
from ml.serve.api.settings import ServerSettings

Limit = Annotated[int, Query(ge=1, le=10_000)]


def files(store: FileStore, settings: ServerSettings) -> APIRouter:
    """All endpoints of files."""
    router = APIRouter(tags=["files"])

    @router.post("/v1/files")
    async def create_file(
        file: UploadFile, purpose: Annotated[Literal["batch", "user_data"], Form()]
    ) -> dict[str, Any]:
        if file.size is not None and file.size > settings.max_upload:
            raise ApiError(413, f"the file is larger than {settings.max_upload} bytes; split it")
        stored = store.new(file.filename or "upload", purpose)
        with open(stored.path, "wb") as target:
            await asyncio.to_thread(shutil.copyfileobj, file.file, target)
        store.add(stored)
        return stored.card

    @router.get("/v1/files")
    async def list_files(
        purpose: str | None = None,
        after: str | None = None,
        limit: Limit = 10_000,
        order: Literal["asc", "desc"] = "desc",
    ) -> dict[str, Any]:
        cards = [file.card for file in store.all() if purpose in (None, file.purpose)]
        return page(cards if order == "asc" else cards[::-1], after, limit)

    @router.get("/v1/files/{file_id}")
    async def retrieve_file(file_id: str) -> dict[str, Any]:
        return store.get(file_id).card

    @router.get("/v1/files/{file_id}/content")
    async def retrieve_file_content(file_id: str) -> FileResponse:
        return FileResponse(store.get(file_id).path, media_type="application/octet-stream")

    @router.delete("/v1/files/{file_id}")
    async def delete_file(file_id: str) -> dict[str, Any]:
        store.delete(file_id)
        return {"id": file_id, "object": "file", "deleted": True}

    return router
