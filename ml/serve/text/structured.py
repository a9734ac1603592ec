"""What a text must look like, as OpenAI's and vLLM's bodies ask for it."""

from typing import Any

from ml.errors import UserError
from ml.serve.grammar import StructuredOutput
from ml.serve.text.fields import FieldError, Fields

# The fields that this reads.
FIELDS = ("response_format", "structured_outputs")
_TYPES = ("text", "json_object", "json_schema")
# Of vLLM's ``structured_outputs``.
_KINDS = {"json": "json_schema", "json_object": "json_object", "regex": "regex", "choice": "choice"}


def structured_output(fields: Fields) -> StructuredOutput | None:
    """Reads ``response_format`` (OpenAI) or ``structured_outputs`` (vLLM).

    Raises:
      FieldError: both are given, or one is not as it must be.
    """
    format, other = fields.mapping("response_format"), fields.mapping("structured_outputs")
    if format is not None and other is not None:
        raise FieldError("structured_outputs", "does not go together with response_format: give one of them")
    if other is not None:
        wanted = {_KINDS.get(key, key): value for key, value in other.items() if value is not None}
        unknown = wanted.keys() - set(_KINDS.values())
        if unknown:
            raise FieldError("structured_outputs", f"has {min(unknown)!r}; must be one of {', '.join(_KINDS)}")
        if isinstance(wanted.get("choice"), list):
            wanted["choice"] = tuple(wanted["choice"])
        return _build("structured_outputs", wanted)
    if format is None or format.get("type") == "text":
        return None
    if format.get("type") not in _TYPES:
        raise FieldError("response_format", f"type is {format.get('type')!r}; must be one of {', '.join(_TYPES)}")
    if format["type"] == "json_object":
        return _build("response_format", {"json_object": True})
    described = format.get("json_schema")
    schema = described.get("schema") if isinstance(described, dict) else None
    if not isinstance(schema, dict):
        raise FieldError("response_format", 'json_schema must be {"name": "...", "schema": {...}}')
    return _build("response_format", {"json_schema": schema})


def _build(field: str, wanted: dict[str, Any]) -> StructuredOutput:
    try:
        return StructuredOutput(**wanted)
    except UserError as error:
        raise FieldError(field, str(error).removeprefix("structured_output: ")) from error
