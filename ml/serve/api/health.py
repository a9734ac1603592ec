"""``/health`` for load balancers, ``/metrics`` for Prometheus."""

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from ml.serve.api.errors import ApiError
from ml.serve.api.server import Server


def health(server: Server) -> APIRouter:
    """Both pages."""
    router = APIRouter(tags=["operation"])

    @router.get("/health")
    async def health() -> Response:
        if server.driver.draining or not server.driver.healthy:
            state = "shutting down" if server.driver.healthy else "broken: see the server's log"
            return ApiError(503, f"the server is {state}").response()
        return JSONResponse({"status": "ok"})

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router
