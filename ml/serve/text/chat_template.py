"""Chat templates: a conversation as the text that a model was trained on, by the model's own Jinja template."""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from ml.errors import UserError

_DEFAULT, _WITH_TOOLS = "default", "tool_use"


class ChatTemplate:
    """Renders conversations exactly as transformers' ``apply_chat_template`` does."""

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str], where: str):
        """Nothing is compiled yet.

        Args:
          templates: Jinja sources by name; ``default`` is used, or ``tool_use`` where there is one and tools are given.
          special_tokens: what templates may name: ``bos_token``, ``eos_token`` and so on.
          where: the file, for messages.
        """
        self._templates, self._special_tokens, self._where = dict(templates), dict(special_tokens), where

    @classmethod
    def load(cls, folder: Path, file: Path | None = None) -> "ChatTemplate | None":
        """The template of a Hugging Face folder, or that in ``file``; ``None``: there is none.

        Raises:
          UserError: a file cannot be read, or ``file`` is not a Jinja template.
        """
        settings = _settings(folder)
        special_tokens = _special_tokens(settings)
        if file is not None:
            template = cls({_DEFAULT: _read(file)}, special_tokens, str(file))
            template.compiled(_DEFAULT)
            return template
        templates = {}
        if (folder / "chat_template.jinja").is_file():  # goes before tokenizer_config.json
            templates[_DEFAULT] = _read(folder / "chat_template.jinja")
        for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
            templates[path.stem] = _read(path)
        if templates:
            return cls(templates, special_tokens, str(folder / "chat_template.jinja"))
        path = folder / "tokenizer_config.json"
        given = settings.get("chat_template")
        if given is None:
            return None
        if isinstance(given, str):
            given = [{"name": _DEFAULT, "template": given}]
        try:
            templates = {str(each["name"]): str(each["template"]) for each in given}
        except (TypeError, KeyError) as error:
            raise UserError(
                f'{path}: chat_template: must be a string or a list of {{"name": ..., "template": ...}}'
            ) from error
        return cls(templates, special_tokens, str(path))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **more: Any,
    ) -> str:
        """The conversation as text, special tokens spelled out.

        Args:
          messages: each with ``role`` and ``content``.
          tools: functions that the model may call, as JSON schemas.
          add_generation_prompt: whether the text ends where the model's answer begins.
          **more: what the template knows besides, such as ``enable_thinking``.

        Raises:
          UserError: the template refuses the conversation or fails on it.
        """
        if not messages:
            raise UserError("messages: is empty; give at least one message, with role and content")
        name = self._choose(tools)
        compiled = self.compiled(name)
        values: dict[str, Any] = {"documents": None, **self._special_tokens, **more}
        try:
            return compiled.render(
                messages=messages, tools=tools, add_generation_prompt=add_generation_prompt, **values
            )
        except _Refusal as error:
            raise UserError(f"messages: the model's chat template refuses them: {error.message}") from error
        except Exception as error:  # a template is a program: it may fail in any way
            raise UserError(
                f"messages: the chat template in {self._where} fails on them ({type(error).__name__}: {error}); "
                "does each message have what the model's documentation asks for?"
            ) from error

    def compiled(self, name: str) -> jinja2.Template:
        """A template ready to render.

        Raises:
          UserError: it is not valid Jinja.
        """
        try:
            return _compile(self._templates[name])
        except jinja2.TemplateSyntaxError as error:
            which = "" if name == _DEFAULT else f" {name!r}"
            raise UserError(
                f"{self._where}: chat template{which}, line {error.lineno}: {error.message}; mend it, or give another "
                "with --chat_template=FILE"
            ) from error

    def _choose(self, tools: Any) -> str:
        if tools is not None and _WITH_TOOLS in self._templates:
            return _WITH_TOOLS
        if _DEFAULT not in self._templates:
            raise UserError(
                f"{self._where}: chat_template: none is named 'default', only {', '.join(sorted(self._templates))}; "
                "give one with --chat_template=FILE"
            )
        return _DEFAULT


class _Refusal(jinja2.TemplateError):
    """The template called ``raise_exception``."""


class _Generation(jinja2.ext.Extension):
    """``{% generation %} ... {% endgeneration %}`` marks the assistant's words for training; here a mere bracket."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The statements within, in a scope of their own."""
        line = next(parser.stream).lineno
        scope = jinja2.nodes.Scope(lineno=line)
        scope.body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [scope]


@functools.lru_cache(maxsize=64)
def _compile(source: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    return environment.from_string(source)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own would write ``<`` as an escape, for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise _Refusal(message)


def _now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _settings(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            try:
                settings |= json.loads(_read(folder / name))
            except (ValueError, TypeError) as error:
                raise UserError(f"{folder / name} is not a JSON object ({error}): mend or remove it") from error
    return settings


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Tokens by their part, such as ``bos_token``."""
    tokens = {}
    for key, value in {**settings, **_mapping(settings.get("extra_special_tokens"))}.items():
        value = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(value, str):
            tokens[key] = value
    return tokens


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}: convert it") from error
