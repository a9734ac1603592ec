"""``/v1/embeddings``."""

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from ml.serve.api.disconnect import while_connected
from ml.serve.api.protocol import EmbeddingBody
from ml.serve.api.server import EMBEDDINGS, Server


def embeddings(server: Server) -> APIRouter:
    """The endpoint; see `ml.serve.api.embedder` for what an embedding is."""
    router = APIRouter(tags=["embeddings"])

    @router.post(EMBEDDINGS)
    async def create_embedding(body: EmbeddingBody, request: Request) -> Response:
        return JSONResponse(await while_connected(request, server.complete(EMBEDDINGS, body.sent())))

    return router
