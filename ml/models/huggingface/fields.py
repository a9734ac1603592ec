"""The fields of a Hugging Face ``config.json``, each checked, and none left unread."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from ml.errors import UserError
from ml.models.huggingface.families import ACTIVATIONS, COMMON, DEFAULTS, HARMLESS


class Fields:
    """The fields of a ``config.json`` under one family's defaults, remembering which were asked for."""

    def __init__(self, values: Mapping[str, Any], source: str, family: str):
        self.values, self.source, self.family = values, source, family
        self.defaults = COMMON | DEFAULTS[family]
        self.read: set[str] = set()

    def __call__(
        self, name: str, kind: type, default: Any = dataclasses.MISSING, *, positive: bool = True, null: bool = False
    ) -> Any:
        """The field ``name``, checked to be a ``kind``, or null where ``null`` gives that a meaning."""
        self.read.add(name)
        value = self.values.get(name, self.defaults.get(name, default))
        if value is dataclasses.MISSING:
            raise self.error(name, "is missing, and nothing can stand for it")
        if value is None:
            if not null:
                raise self.error(name, f"is null; expected {kind.__name__}")
            return None
        number = isinstance(value, int | float) and not isinstance(value, bool)
        fits = {int: number and value == int(value), float: number}.get(kind, isinstance(value, kind))
        if not fits:
            raise self.error(name, f"is {value!r}; expected {kind.__name__}")
        if positive and number and value <= 0:
            raise self.error(name, f"is {value!r}; expected a positive number")
        return kind(value)

    def refuse_if(self, name: str, wrong: Callable[[Any], bool] = bool, why: str = "has no counterpart here") -> None:
        """Raises if the field is there with a value that would change the forward pass."""
        self.read.add(name)
        if name in self.values and self.values[name] is not None and wrong(self.values[name]):
            raise self.error(name, f"is {json.dumps(self.values[name])}, which {why}")

    def error(self, name: str, problem: str) -> UserError:
        """What to raise about a field."""
        return UserError(f"{self.source}: {name} {problem}")

    def finish(self) -> None:
        """Refuses whatever is set and was not read."""
        for name in sorted(set(self.values) - self.read - HARMLESS):
            if self.values[name] not in (None, False, [], {}, ""):
                raise self.error(
                    name, f"is not a field that {self.family} is known to have; if it changes nothing, remove it"
                )


def activation(fields: Fields, name: str) -> Any:
    """The nonlinearity that the field ``name`` means, as `TransformerConfig` calls it."""
    value = fields(name, str)
    if value not in ACTIVATIONS:
        raise fields.error(name, f"is {value!r}; supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[value]
