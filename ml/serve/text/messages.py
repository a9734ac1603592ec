"""OpenAI's chat messages and tools in the form that chat templates know."""

import json
from collections.abc import Mapping
from typing import Any

from ml.serve.text.fields import FieldError, Fields

ROLES = ("system", "developer", "user", "assistant", "tool")


def chat_messages(fields: Fields) -> list[dict[str, Any]]:
    """The messages: contents as one string each, arguments of tool calls as objects.

    Raises:
      FieldError: none is there, or one is not as it must be.
    """
    fields.required("messages")
    messages = fields.listing("messages")
    if not messages:
        raise FieldError("messages", "is an empty list; give at least one message")
    return [_message(message, f"messages[{i}]", fields) for i, message in enumerate(messages)]


def chat_tools(fields: Fields) -> list[dict[str, Any]] | None:
    """The tools that the template is told of; ``None``: of none.

    Raises:
      FieldError: a tool is not a function with a name, or ``tool_choice`` asks for what cannot be promised.
    """
    choice = fields.any("tool_choice")
    if choice not in (None, "auto", "none"):
        raise FieldError("tool_choice", 'must be "auto" or "none": the model itself decides what to call')
    tools = fields.listing("tools")
    for i, tool in enumerate(tools or ()):
        function = tool.get("function") if isinstance(tool, dict) else None
        if (
            not isinstance(function, dict)
            or tool.get("type") != "function"
            or not isinstance(function.get("name"), str)
        ):
            raise FieldError(
                "tools", f'[{i}] must be {{"type": "function", "function": {{"name": ..., "parameters": {{...}}}}}}'
            )
    return None if choice == "none" else tools or None


def _message(message: Any, where: str, fields: Fields) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise FieldError(where, 'must be an object like {"role": "user", "content": "..."}')
    role = message.get("role")
    if role not in ROLES:
        raise FieldError(f"{where}.role", f"is {role!r}; must be one of {', '.join(ROLES)}")
    known = {key: value for key, value in message.items() if value is not None}
    calls = known.get("tool_calls")
    content = known.get("content")
    if content is None and not (role == "assistant" and calls):
        raise FieldError(f"{where}.content", "is missing")
    # A call alone has an empty content: templates take its length or trim it.
    known["content"] = "" if content is None else _content(content, f"{where}.content", fields)
    if calls is not None:
        if not isinstance(calls, list):
            raise FieldError(f"{where}.tool_calls", "must be a list")
        known["tool_calls"] = [_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    for key, value in known.items():
        if isinstance(value, str):
            fields.unicode(f"{where}.{key}", value)
    return known


def _content(content: Any, where: str, fields: Fields) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise FieldError(where, 'must be a string or a list of {"type": "text", "text": "..."}')
    for i, part in enumerate(content):
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise FieldError(f"{where}[{i}]", 'must be {"type": "text", "text": "..."}: models here read text alone')
    return "\n".join(part["text"] for part in content)


def _call(call: Any, where: str) -> Mapping[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise FieldError(where, 'must be {"id": ..., "type": "function", "function": {"name": ..., "arguments": ...}}')
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise FieldError(f"{where}.function.arguments", f"is not JSON: {error}") from error
    return {**call, "function": {**function, "arguments": arguments}}
