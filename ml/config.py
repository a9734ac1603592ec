"""Turns loose mappings (``ConfigDict``, parsed JSON) into frozen dataclasses, and back, refusing what does not fit."""

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, Union

from ml.errors import UserError, nearest

T = TypeVar("T")


def build(cls: type[T], values: Mapping[str, Any], path: str = "config") -> T:
    """Builds the frozen dataclass ``cls`` from ``values``, checking every key and type on the way down.

    Args:
      cls: a dataclass; fields may be scalars, ``Literal``, ``X | None``, ``tuple[X, ...]``, ``Mapping``, dataclasses or
        a union of dataclasses, which a field ``kind: Literal[...]`` tells apart. ``Annotated[Any, X]`` is ``X`` here,
        and whatever its readers take it for beyond.
      values: a mapping such as ``ml_collections.ConfigDict`` or parsed JSON.
      path: dotted name of ``values``, for messages.

    Raises:
      UserError: unknown key (names the nearest valid one), wrong type, or a value that ``cls`` itself refuses.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    kwargs = {}
    for key, value in values.items():
        if key not in fields:
            raise UserError(f"{path}.{key}: no such key; {nearest(key, fields)}")
        kwargs[key] = _convert(hints[key], value, f"{path}.{key}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in kwargs:
            raise UserError(f"{path}.{name}: required, but not given")
    try:
        return cls(**kwargs)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def to_dict(config: Any) -> dict[str, Any]:
    """The inverse of `build`: plain dicts, lists and scalars that `json` or ``ConfigDict`` can hold."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        if _is_mapping(value):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, tuple | list):
            return [plain(item) for item in value]
        return value

    return plain(config)


def _convert(hint: Any, value: Any, path: str) -> Any:
    """Checks one value against its type hint; coerces only int -> float, list -> tuple and mapping -> dataclass."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _convert(args[1], value, path)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, path)
    if origin is Literal:
        if value not in args:
            hint_text = nearest(str(value), map(str, args))
            raise UserError(f"{path}: {value!r} is not one of {', '.join(map(repr, args))}; {hint_text}")
        return value
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise _mismatch("a list", value, path)
        return tuple(_convert(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        if not _is_mapping(value):
            raise _mismatch("a group of keys", value, path)
        return build(hint, value, path)  # type: ignore[arg-type]
    if origin is not None and issubclass(origin, Mapping):
        if not _is_mapping(value):
            raise _mismatch("a mapping", value, path)
        return {key: _convert(args[1], item, f"{path}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if (hint is int and isinstance(value, bool)) or not isinstance(value, hint):
        raise _mismatch({"str": "a string", "bool": "true or false"}.get(hint.__name__, hint.__name__), value, path)
    return value


def _convert_union(args: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and type(None) in args:
        return None
    choices = [arg for arg in args if arg is not type(None)]
    groups = [choice for choice in choices if dataclasses.is_dataclass(choice)]
    if len(groups) > 1 and _is_mapping(value):
        return _convert(_of_kind(groups, value, path), value, path)
    for choice in choices[:-1]:
        try:
            return _convert(choice, value, path)
        except UserError:
            continue
    return _convert(choices[-1], value, path)


def _of_kind(choices: list[Any], value: Any, path: str) -> Any:
    """Of several dataclasses the one whose ``kind`` the mapping names; without a ``kind`` the one that has none.

    So a mistyped key is told of the dataclass that was meant, not of the last one that was tried.
    """
    named: dict[str | None, Any] = {}
    for choice in choices:
        hint = typing.get_type_hints(choice).get("kind")
        named |= dict.fromkeys(typing.get_args(hint) if hint else (None,), choice)
    kind = value.get("kind")
    if kind in named:
        return named[kind]
    known = [name for name in named if name is not None]
    if kind is None:
        raise UserError(f"{path}.kind: required, but not given; it is one of {', '.join(map(repr, known))}")
    raise UserError(f"{path}.kind: {kind!r} is not one of {', '.join(map(repr, known))}; {nearest(str(kind), known)}")


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping) or hasattr(value, "items")  # ConfigDict does not call itself a Mapping


def _mismatch(wanted: str, value: Any, path: str) -> UserError:
    return UserError(f"{path}: expected {wanted}, got {value!r} ({type(value).__name__})")
