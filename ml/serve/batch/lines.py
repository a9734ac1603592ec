"""Lines of OpenAI's Batch files: a request a line in, an answer or an error a line out."""

import dataclasses
import hashlib
import json
from typing import Any

from ml.errors import UserError
from ml.serve.text.fields import FieldError

_EXPECTED = '{"custom_id": "...", "method": "POST", "url": "/v1/chat/completions", "body": {...}}'

_ID = "batch_req_"
# Of every line of an output.
LINE_BEGINNING = f'{{"id": "{_ID}'.encode()


class LineError(UserError):
    """A line is no request.

    Attributes:
      custom_id: the request's name, as far as it could be read.
    """

    def __init__(self, message: str, custom_id: str | None = None):
        super().__init__(message)
        self.custom_id = custom_id


@dataclasses.dataclass(frozen=True)
class BatchLine:
    """A request: its name, the path that it is for, and what it asks."""

    custom_id: str
    url: str
    body: dict[str, Any]


def read_line(raw: bytes) -> BatchLine:
    """Reads a line of the input.

    Raises:
      LineError: it is not a request. What the body asks for is looked at later (`ml.serve.text.requests`).
    """
    try:
        line = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise LineError(f"not UTF-8 at byte {error.start}: convert the file") from error
    except (ValueError, RecursionError) as error:
        raise LineError(f"malformed JSON: {error}; expected {_EXPECTED}") from error
    if not isinstance(line, dict):
        raise LineError(f"not an object; expected {_EXPECTED}")
    custom_id = line.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise LineError(f"custom_id: is {_shown(custom_id)}; must be a string of your choice, unique in the file")
    try:
        custom_id.encode("utf-8")
    except UnicodeEncodeError as error:
        raise LineError("custom_id: holds half of a surrogate pair; mend it") from error
    if line.get("method", "POST") != "POST":
        raise LineError(f'method: is {_shown(line["method"])}; must be "POST"', custom_id)
    url, body = line.get("url"), line.get("body")
    if not isinstance(url, str):
        raise LineError(f'url: is {_shown(url)}; must be a path like "/v1/chat/completions"', custom_id)
    if not isinstance(body, dict):
        raise LineError(f"body: is {_shown(body)}; must be an object", custom_id)
    return BatchLine(custom_id, url, body)


def line_digest(number: int, raw: bytes) -> bytes:
    """Names a line by its place and its bytes, so that an output can be told to belong to an input."""
    return hashlib.blake2b(b"%d\n" % number + raw.strip(), digest_size=12).digest()


def default_seed(custom_id: str, seed: int = 0) -> int:
    """The seed of a request that gives none: the same in every run, and another for every request."""
    digest = hashlib.blake2b(custom_id.encode("utf-8"), digest_size=4, key=seed.to_bytes(8, "big", signed=True))
    return int.from_bytes(digest.digest(), "big")


def answer_line(digest: bytes, custom_id: str, body: dict[str, Any]) -> dict[str, Any]:
    """The output's line of a request that was answered."""
    return _line(digest, custom_id, {"status_code": 200, "request_id": f"req_{digest.hex()}", "body": body}, None)


def error_line(digest: bytes, custom_id: str | None, error: Exception, where: str, status: int = 400) -> dict[str, Any]:
    """The output's line of a request that could not be answered.

    Args:
      digest: of the input's line.
      custom_id: its name, if it has one.
      error: what is wrong.
      where: file and line number.
      status: 400: the request is wrong; 500: something here went wrong.
    """
    field = error.field if isinstance(error, FieldError) else None
    code = "internal_error" if status >= 500 else "invalid_line" if isinstance(error, LineError) else "invalid_request"
    body = {"error": {"message": str(error), "type": f"{code}_error", "param": field, "code": code}}
    response = {"status_code": status, "request_id": f"req_{digest.hex()}", "body": body}
    return _line(digest, custom_id, response, {"code": code, "message": f"{where}: {error}"})


def _line(digest: bytes, custom_id: str | None, response: Any, error: Any) -> dict[str, Any]:
    return {"id": f"{_ID}{digest.hex()}", "custom_id": custom_id, "response": response, "error": error}


def digest_of(record: Any) -> bytes | None:
    """The digest in a line of an output; ``None``: the line is of another kind."""
    name = record.get("id") if isinstance(record, dict) else None
    if not isinstance(name, str) or not name.startswith(_ID):
        return None
    try:
        return bytes.fromhex(name.removeprefix(_ID))
    except ValueError:
        return None


def _shown(value: Any) -> str:
    if value is None:
        return "missing"
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
