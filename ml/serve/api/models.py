"""``/v1/models``: the one that runs here."""

import time
from typing import Any

from fastapi import APIRouter

from ml.serve.api.server import Server


def models(server: Server) -> APIRouter:
    """The list, and the one in it."""
    router = APIRouter(tags=["models"])
    card = {
        "id": server.model.name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "megabatch",
        "max_model_len": server.settings.max_length,
    }

    @router.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @router.get("/v1/models/{model:path}")
    async def retrieve_model(model: str) -> dict[str, Any]:
        server.check_model({"model": model})
        return card

    return router
