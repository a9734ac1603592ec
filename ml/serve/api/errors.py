"""Everything that goes wrong, in OpenAI's form: ``{"error": {"message", "type", "param", "code"}}``."""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ml.errors import UserError
from ml.serve.api.driver import Draining, QueueFull
from ml.serve.api.stream import RequestError
from ml.serve.text.fields import FieldError

_log = logging.getLogger(__name__)
_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
      status: of HTTP.
      headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """What the client reads."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        # A message may quote what the client sent, half a character included.
        message = self.message.encode("utf-8", "backslashreplace").decode()
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.body, self.status, self.headers)


def api_error(error: BaseException, retry_after: int = 1) -> ApiError:
    """Any exception as an answer; what clients cannot know or mend is logged and not shown."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, FieldError):
        return ApiError(400, str(error), param=error.field)
    if isinstance(error, UserError):
        # The engine names the request, by a name of ours.
        text = str(error)
        return ApiError(400, text.split(": ", 1)[1] if text.startswith("request 'r") else text)
    if isinstance(error, RequestValidationError):
        return _invalid(error)
    if isinstance(error, QueueFull):
        retry = {"Retry-After": str(retry_after)}
        return ApiError(429, "too many requests wait already; try again soon", code="queue_full", headers=retry)
    if isinstance(error, Draining):
        return ApiError(503, "the server is shutting down", code="shutting_down")
    if isinstance(error, TimeoutError):
        return ApiError(504, "the request took longer than the server allows", code="timeout")
    if isinstance(error, RequestError):
        return ApiError(500, str(error))
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    _log.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed on this request; its log says more")


def _invalid(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    place = [str(part) for part in first["loc"][1:]]
    param = ".".join(place) or None
    return ApiError(400, f"{param or 'body'}: {first['msg']}", param=param)


def install(app: FastAPI, retry_after: int) -> None:
    """Makes ``app`` answer every error in this form."""

    async def handle(request: Request, error: Exception) -> JSONResponse:
        return api_error(error, retry_after).response()

    for kind in (ApiError, UserError, RequestValidationError, QueueFull, Draining, TimeoutError, RequestError):
        app.add_exception_handler(kind, handle)
    app.add_exception_handler(HTTPException, handle)
    app.add_exception_handler(Exception, handle)
