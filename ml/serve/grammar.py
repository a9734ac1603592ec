"""Structured output: which tokens keep a text within a JSON schema, a regular expression or a list of choices.

The grammars are llguidance's (https://github.com/guidance-ai/llguidance), compiled against a ``tokenizer.json``.
"""

import collections
import dataclasses
import json
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt32

from ml.data.tokenizer import Tokenizer
from ml.errors import UserError

# Between the parts of a JSON text. Bounded: a weak model would otherwise write white space until it must stop.
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,32}"
# Compiled grammars that are kept; one is some kilobytes to some megabytes.
_KEPT = 256


@dataclasses.dataclass(frozen=True)
class StructuredOutput:
    """What a text must look like: exactly one of these; the names are vLLM's.

    Attributes:
      json_schema: a JSON text that this schema (an object, or its JSON text) allows, with properties in its order. A
        keyword that cannot be enforced is an error.
      json_object: any JSON object.
      regex: a text that this regular expression matches as a whole; no look-around, no back-references.
      choice: one of these texts.
    """

    json_schema: Mapping[str, Any] | str | None = None
    json_object: bool = False
    regex: str | None = None
    choice: tuple[str, ...] | None = None

    def __post_init__(self):
        given = [field.name for field in dataclasses.fields(self) if getattr(self, field.name) not in (None, False)]
        if len(given) != 1:
            raise UserError(
                f"structured_output: has {' and '.join(given) or 'none of its fields'}: give exactly one of "
                "json_schema, json_object, regex and choice"
            )
        if self.json_schema is not None:
            object.__setattr__(self, "json_schema", _schema_text(self.json_schema))
        elif self.regex is not None and not isinstance(self.regex, str):
            raise UserError(f"structured_output.regex={self.regex!r}: must be a text")
        elif self.choice is not None:
            if isinstance(self.choice, str) or not all(isinstance(c, str) and c for c in self.choice):
                raise UserError(
                    f"structured_output.choice={self.choice!r}: must be a list of texts, none of them empty"
                )
            object.__setattr__(self, "choice", tuple(self.choice))
            if not self.choice:
                raise UserError("structured_output.choice: is empty; give at least one text")

    @property
    def field(self) -> str:
        """The field that is given."""
        return next(f.name for f in dataclasses.fields(self) if getattr(self, f.name) not in (None, False))


class Grammars:
    """Compiles structured outputs for one tokenizer, each once. Threads may share it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: Iterable[int] = ()):
        """Reads the vocabulary, which takes about a second for a large one.

        Args:
          tokenizer: the model's.
          vocab_size: of the model, padding included; what the tokenizer does not know is never allowed.
          stop_ids: tokens that end a text.

        Raises:
          UserError: llguidance is missing, or does not know this kind of tokenizer.
        """
        try:
            import llguidance
        except ImportError as error:
            raise UserError("structured_output: needs llguidance; install megabatch[serve]") from error
        self._library: Any = llguidance
        self.vocab_size, self.stop_ids = vocab_size, frozenset(stop_ids)
        ends = sorted(self.stop_ids) or [tokenizer.eos_id]
        try:
            self._tokenizer = llguidance.LLTokenizer(tokenizer.to_json(), n_vocab=vocab_size, eos_token=ends)
        except ValueError as error:
            raise UserError(f"structured_output: this tokenizer cannot be used: {_one_line(error)}") from error
        # What the library takes for the end of text is not for it to decide: see `Matcher`.
        self._ends = _bits(self._tokenizer.eos_tokens, vocab_size)
        self._compiled: collections.OrderedDict[StructuredOutput, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def compile(self, wanted: StructuredOutput) -> None:
        """Compiles ahead of `matcher`, from any thread; nothing if it is known.

        Raises:
          UserError: a schema or expression that is wrong, that cannot be enforced, or that nothing satisfies.
        """
        self._matcher(wanted)

    def matcher(self, wanted: StructuredOutput, stop_ids: Iterable[int] | None = None) -> "Matcher":
        """A matcher at the beginning of a text.

        Args:
          wanted: what the text must look like.
          stop_ids: tokens that end this text; ``None``: those of all.

        Raises:
          UserError: see `compile`.
        """
        stops = self.stop_ids if stop_ids is None else frozenset(stop_ids)
        first = Matcher(self._matcher(wanted).deep_copy(), _bits(stops, self.vocab_size), self._ends)
        if first.finished:
            raise UserError(f"structured_output.{wanted.field}: allows no text but the empty one")
        return first

    def _matcher(self, wanted: StructuredOutput) -> Any:
        with self._lock:
            found = self._compiled.get(wanted)
            if found is not None:
                self._compiled.move_to_end(wanted)
                return found
        made = self._compile(wanted)  # outside of the lock: it may take a while
        with self._lock:
            self._compiled[wanted] = made
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        return made

    def _compile(self, wanted: StructuredOutput) -> Any:
        library = self._library.LLMatcher
        if wanted.json_schema is not None or wanted.json_object:
            schema = '{"type": "object"}' if wanted.json_object else wanted.json_schema
            grammar = library.grammar_from_json_schema(schema, defaults={"whitespace_pattern": _WHITESPACE})
        else:
            regex = "|".join(map(re.escape, wanted.choice)) if wanted.choice else wanted.regex
            grammar = library.grammar_from_regex(regex)
        limits = self._library.LLParserLimits(verbose_errors=False)
        made = library(self._tokenizer, grammar, log_level=0, limits=limits)
        if made.is_error():
            raise UserError(f"structured_output.{wanted.field}: {_one_line(made.get_error())}")
        return made


class Matcher:
    """Follows one text.

    Tokens that end a text are not part of it, so they are allowed where the text is whole, and nowhere else, even if
    they are tokens that the grammar could take.

    Attributes:
      finished: the text is whole, and nothing can follow.
    """

    def __init__(self, matcher: Any, stops: np.ndarray, ends: np.ndarray):
        """Takes over llguidance's matcher; ``stops`` end this text, ``ends`` are what the library takes for that."""
        self._matcher, self._stops = matcher, stops
        self._kept = ~(stops | ends)
        self.finished = False
        self._look()

    def copy(self) -> "Matcher":
        """Another one at the same place."""
        new = object.__new__(Matcher)
        new.__dict__ |= self.__dict__
        new._matcher = self._matcher.deep_copy()
        return new

    def mask(self) -> UInt32[np.ndarray, " words"]:
        """A bit per token of the model, the lowest first: whether it may come next."""
        return self._mask

    def advance(self, tokens: Sequence[int]) -> None:
        """Takes what was written, without the token that ends the text.

        Raises:
          UserError: it is not allowed, or the grammar has become too large to follow.
        """
        if not self._matcher.consume_tokens(list(tokens)):
            raise UserError(f"structured_output: {_one_line(self._matcher.get_error())}")
        self._look()

    def _look(self) -> None:
        whole = self._matcher.is_accepting()
        if self._matcher.is_stopped():
            going_on = np.zeros_like(self._kept)
        else:
            going_on = np.frombuffer(self._matcher.compute_bitmask(), np.uint32) & self._kept
        if self._matcher.is_error():
            raise UserError(f"structured_output: {_one_line(self._matcher.get_error())}")
        self.finished = whole and not going_on.any()
        self._mask = going_on | self._stops if whole else going_on
        if not whole and not going_on.any():
            raise UserError("structured_output: no token of this model continues the text")


def _bits(tokens: Iterable[int], vocab_size: int) -> np.ndarray:
    words = np.zeros(-(-vocab_size // 32), np.uint32)
    for token in tokens:
        if token < vocab_size:  # one beyond is never drawn
            words[token // 32] |= np.uint32(1) << np.uint32(token % 32)
    return words


def _schema_text(schema: Mapping[str, Any] | str) -> str:
    """The JSON text of a schema: what tells it from others, properties' order included."""
    where = "structured_output.json_schema"
    try:
        parsed = json.loads(schema) if isinstance(schema, str) else schema
        if isinstance(parsed, Mapping):
            return json.dumps(dict(parsed))
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: is not JSON: {error}") from error
    raise UserError(f"{where}: must be an object, such as {{'type': 'object'}}, not {type(parsed).__name__}")


def _one_line(error: object) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:300] + " ..."
