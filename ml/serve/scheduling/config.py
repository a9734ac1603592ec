"""The settings of the scheduler."""

import dataclasses
from typing import Literal

from ml.errors import UserError


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """What a step may hold, and how the cache is spent.

    Attributes:
      pages: pages of the cache.
      page_size: tokens in a page.
      token_budget: most tokens that one step feeds to the model (Agrawal et al. 2024, Sarathi-Serve: the largest that
        keeps a step within the wanted time between tokens).
      max_running: most sequences that run at once; sizes the device's per-sequence state.
      decode_steps: most decode steps of one dispatch, a power of two; more than one only while nothing is prefilled.
      watermark: part of the pages that admission leaves free, so that what runs can grow.
      chunk_multiple: a chunk of a prompt that is not its last ends at a multiple of this many tokens.
      max_length: most tokens of prompt and completion together; ``None``: what the cache holds.
      share_in_flight: whether a request waits for a prefix that another one is computing right now.
      reserve: what admission finds room for: the ``"prompt"``, or also what all that run are ``"expected"`` to draw
        (Zheng et al. 2024, BatchLLM: the batch is sized by memory instead of a number of requests).
      speculate: most tokens of a sequence that are guessed and fed at once, to be kept as far as they turn out right
        (Leviathan et al. 2023); 0: none.
      speculate_ngram: longest n-gram that is looked up for a guess.
    """

    pages: int
    page_size: int = 64
    token_budget: int = 2048
    max_running: int = 256
    decode_steps: int = 1
    watermark: float = 0.01
    chunk_multiple: int = 1
    max_length: int | None = None
    share_in_flight: bool = True
    reserve: Literal["prompt", "expected"] = "prompt"
    speculate: int = 0
    speculate_ngram: int = 3

    def __post_init__(self):
        for field in ("pages", "page_size", "token_budget", "max_running", "decode_steps", "chunk_multiple"):
            if getattr(self, field) < 1:
                raise UserError(f"{field}={getattr(self, field)}: must be at least 1")
        if self.decode_steps & (self.decode_steps - 1):
            raise UserError(f"decode_steps={self.decode_steps}: must be a power of two, often 8")
        if not 0 <= self.watermark < 1:
            raise UserError(f"watermark={self.watermark}: must be at least 0 and below 1, often 0.01")
        if self.max_length is not None and self.max_length < 2:
            raise UserError(
                f"max_length={self.max_length}: must be at least 2, a token of prompt and one of completion"
            )
        if self.reserve not in ("prompt", "expected"):
            raise UserError(f"reserve={self.reserve!r}: must be 'prompt' or 'expected'")
        if not 0 <= self.speculate < self.token_budget:
            raise UserError(
                f"speculate={self.speculate}: must be at least 0 (off), often 4, and below "
                f"token_budget={self.token_budget}"
            )
        if self.speculate_ngram < 1:
            raise UserError(f"speculate_ngram={self.speculate_ngram}: must be at least 1, often 3")
        # All may decode but one, and that one's prompt must still get on.
        least = self.max_running - 1 + self.chunk_multiple
        if self.token_budget < least:
            raise UserError(
                f"token_budget={self.token_budget}: must be at least {least} for max_running={self.max_running} and "
                f"chunk_multiple={self.chunk_multiple}; raise it, or lower max_running"
            )
