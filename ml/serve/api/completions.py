"""``/v1/completions`` and ``/v1/chat/completions``, whole or streamed."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from ml.serve.api.disconnect import while_connected
from ml.serve.api.protocol import ChatBody, CompletionBody, Generation
from ml.serve.api.server import Server
from ml.serve.api.streaming import streamed
from ml.serve.text.fields import FieldError

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"


def completions(server: Server) -> APIRouter:
    """Both endpoints."""
    router = APIRouter(tags=["generation"])

    @router.post(COMPLETIONS)
    async def create_completion(body: CompletionBody, request: Request) -> Response:
        return await _respond(server, COMPLETIONS, body, request)

    @router.post(CHATS)
    async def create_chat_completion(body: ChatBody, request: Request) -> Response:
        return await _respond(server, CHATS, body, request)

    return router


async def _respond(server: Server, url: str, body: Generation, request: Request) -> Response:
    sent: dict[str, Any] = body.sent()
    options = sent.pop("stream_options", None)
    if not sent.get("stream"):
        if options is not None:
            raise FieldError("stream_options", "needs stream: true beside it")
        return JSONResponse(await while_connected(request, server.complete(url, sent)))
    deadline = asyncio.get_running_loop().time() + server.settings.request_timeout
    async with asyncio.timeout_at(deadline):
        return await streamed(server, await server.read(url, sent), options or {}, deadline)
