"""The grammars of the samples that an engine runs: what their next token may be, and how their texts end."""

from collections.abc import Iterable, Sequence

import numpy as np

from ml.errors import UserError
from ml.serve.grammar import Grammars, Matcher, StructuredOutput
from ml.serve.scheduling.request import Request
from ml.serve.scheduling.request import Sequence as Sample
from ml.serve.scheduling.step import Step, Update


class ConstrainedSamples:
    """Knows how far each sample with a structured output has come in its grammar.

    The host must see a token before it can say what may follow, so such requests are ``token_by_token``.
    """

    def __init__(self, grammars: Grammars | None):
        """With ``None``, no request can have a structured output."""
        self._grammars = grammars
        self._matchers: dict[Sample, Matcher] = {}  # of samples that are not finished

    def compile(self, request: Request, wanted: StructuredOutput | None) -> Matcher | None:
        """The beginning of what `begin` takes; ``None``: nothing constrains the request.

        Raises:
          UserError: see `Grammars.compile`; or there are no grammars.
        """
        if wanted is None:
            return None
        try:
            if self._grammars is None:
                raise UserError(f"structured_output.{wanted.field}: this engine has no grammars; give it a tokenizer's")
            return self._grammars.matcher(wanted, request.stop_ids)
        except UserError as error:
            raise UserError(f"request {request.id!r}: {error}") from error

    def begin(self, samples: Sequence[Sample], matcher: Matcher | None) -> None:
        """Takes in the samples of a request."""
        if matcher is not None:
            self._matchers |= {sample: matcher.copy() for sample in samples}

    def forget(self, updates: Iterable[Update]) -> None:
        """Drops samples that have ended."""
        for update in updates:
            if update.sequence.done:
                self._matchers.pop(update.sequence, None)

    def allowed(self, step: Step) -> dict[int, np.ndarray]:
        """Per row with a grammar, a bit per token: whether it may be drawn."""
        if not self._matchers:
            return {}
        matchers = ((i, self._matchers.get(row.sequence)) for i, row in enumerate(step.rows))
        return {i: matcher.mask() for i, matcher in matchers if matcher is not None}

    def follow(self, updates: Iterable[Update]) -> tuple[list[Sample], list[tuple[Sample, UserError]]]:
        """Takes in what was drawn.

        Returns:
          Samples whose text is whole and cannot go on; and those whose grammar failed, and how.
        """
        whole: list[Sample] = []
        failed: list[tuple[Sample, UserError]] = []
        for update in updates if self._matchers else ():
            matcher = self._matchers.get(update.sequence)
            if matcher is None or update.sequence.done:
                continue
            try:
                matcher.advance(update.tokens)
                if matcher.finished:
                    whole.append(update.sequence)
            except UserError as error:
                failed.append((update.sequence, error))
        return whole, failed
