"""Fields of a JSON object, read with their types checked."""

from collections.abc import Collection, Mapping
from typing import Any

from ml.errors import UserError, nearest


class FieldError(UserError):
    """A field of a request is wrong.

    Attributes:
      field: its name.
    """

    def __init__(self, field: str, problem: str):
        """Reads as ``field: problem``."""
        super().__init__(f"{field}: {problem}" if not problem.startswith(("=", "[")) else f"{field}{problem}")
        self.field = field


class Fields:
    """Reads a JSON object; ``null`` is as good as absent."""

    def __init__(self, body: Mapping[str, Any], known: Collection[str]):
        """Raises `FieldError` for a field that is not among the ``known`` ones."""
        self._body = body
        for name in body:
            if name not in known:
                raise FieldError(name, f"there is no such field; {nearest(name, known)}")

    def any(self, name: str) -> Any:
        """A value of any type; ``None`` if absent."""
        return self._body.get(name)

    def required(self, name: str) -> Any:
        """A value of any type that must be there."""
        value = self._body.get(name)
        if value is None:
            raise FieldError(name, "is missing")
        return value

    def number(self, name: str) -> float | None:
        """A number."""
        value = self._body.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise FieldError(name, f"is {_shown(value)}; must be a number")
        try:
            return float(value)
        except OverflowError:
            raise FieldError(name, "is beyond all numbers that a float can hold") from None

    def integer(self, name: str) -> int | None:
        """A whole number."""
        value = self._body.get(name)
        if value is not None and type(value) is not int:
            raise FieldError(name, f"is {_shown(value)}; must be a whole number")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self._body.get(name)
        if value is not None and not isinstance(value, bool):
            raise FieldError(name, f"is {_shown(value)}; must be true or false")
        return default if value is None else value

    def text(self, name: str) -> str | None:
        """A string."""
        value = self._body.get(name)
        if value is not None and not isinstance(value, str):
            raise FieldError(name, f"is {_shown(value)}; must be a string")
        return None if value is None else self.unicode(name, value)

    def listing(self, name: str) -> list[Any] | None:
        """A list of anything."""
        value = self._body.get(name)
        if value is not None and not isinstance(value, list):
            raise FieldError(name, f"is {_shown(value)}; must be a list")
        return value

    def mapping(self, name: str) -> dict[str, Any] | None:
        """An object."""
        value = self._body.get(name)
        if value is not None and not isinstance(value, dict):
            raise FieldError(name, f"is {_shown(value)}; must be an object")
        return value

    def unicode(self, name: str, text: str) -> str:
        """``text``, if it can be written as UTF-8: JSON's escapes may spell half a character."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise FieldError(
                name, f"holds {text[error.start]!r} at character {error.start}, half of a surrogate pair: mend the text"
            ) from None
        return text


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
