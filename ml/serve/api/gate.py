"""What a request must pass before any handler sees it: the API key and the size of its body."""

import hmac
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from ml.serve.api.errors import ApiError
from ml.serve.api.settings import ServerSettings

OPEN_PATHS = frozenset({"/health"})
_UPLOADS = "/v1/files"
_FORM_OVERHEAD = 64 * 1024


class Gate:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, settings: ServerSettings):
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        try:
            self._check_key(scope["path"], headers)
            most = self._most(scope["path"])
            length = headers.get(b"content-length", b"0")
            if length.isdigit() and int(length[:20]) > most:
                raise _too_large(most)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        await self._app(scope, _Counted(receive, most), send)

    def _check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        key = self._settings.api_key
        if key is None or path in OPEN_PATHS:
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), key.encode()):
            raise ApiError(
                401,
                "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _most(self, path: str) -> int:
        return self._settings.max_upload + _FORM_OVERHEAD if path == _UPLOADS else self._settings.max_body


class _Counted:
    """Ends a body that says less about its length than it has."""

    def __init__(self, receive: Receive, most: int):
        self._receive, self._most, self._seen = receive, most, 0

    async def __call__(self) -> Any:
        message = await self._receive()
        if message["type"] == "http.request":
            self._seen += len(message.get("body", b""))
            if self._seen > self._most:
                error = _too_large(self._most)
                raise HTTPException(error.status, error.message)  # of a kind that body parsers let through
        return message


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most} bytes; send less at once", headers={"Connection": "close"})
