"""The settings of the engine."""

import dataclasses
from collections.abc import Collection
from typing import Any, Literal

import jax.numpy as jnp

from ml.errors import UserError, nearest
from ml.serve.scheduling.schedules import SCHEDULES
from pallas_kernels.paged_attention import Implementation


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """How much runs at once.

    Attributes:
      max_length: most tokens of prompt and completion together; ``None``: the model's longest sequence.
      cache_tokens: tokens that the cache holds; ``None``: those of ``max_running`` sequences of ``max_length``.
      page_size: tokens in a page.
      max_running: most sequences that run at once.
      token_budget: most tokens that a step feeds to the model: prompts are cut into chunks of what decodes leave.
      decode_steps: most tokens per sequence between two looks of the host, while no prompt waits: the stream's grain.
      speculate: most tokens of a sequence that are guessed by what followed where its last tokens stood before, and
        verified in one pass, step by step instead of ``decode_steps``: fewer passes where texts repeat themselves or
        their prompts; no text depends on it (but for rounding, as it does on company). Requests with penalties,
        ``min_tokens`` or a structured output do without. 0: off.
      speculate_ngram: longest n-gram that is looked up; shorter ones are tried after it, down to 2.
      schedule: ``fifo``; ``prefix``: requests whose prompt is cached first; ``planned``: `Engine.generate` orders all
        prompts so that each shared prefix is computed once, used, and freed (Zheng et al. 2024, BatchLLM).
      share: read a prefix that several running sequences have in common once for all of them: ``auto``: where the
        crossover measured on this device says that it pays; ``always``; ``never``.
      dtype: of activations.
      cache_dtype: of keys and values; ``None``: as ``dtype``; ``int8`` and ``float8_e4m3fn`` are kept with scales.
      invariant: attention does not depend, bit for bit, on what else runs, on how a prompt was cut, or on what is
        cached; the model's other products may still round by the number of rows that they are given.
      implementation: of attention; see `pallas_kernels.paged_attention`.
    """

    max_length: int | None = None
    cache_tokens: int | None = None
    page_size: int = 16
    max_running: int = 64
    token_budget: int = 512
    decode_steps: int = 8
    speculate: int = 0
    speculate_ngram: int = 3
    schedule: Literal["fifo", "prefix", "planned"] = "fifo"
    share: Literal["auto", "always", "never"] = "auto"
    dtype: Any = jnp.float32
    cache_dtype: Any = None
    invariant: bool = False
    implementation: Implementation = "auto"

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise UserError(f"schedule={self.schedule!r}: no such schedule; {nearest(self.schedule, SCHEDULES)}")

    @classmethod
    def for_job(cls, lengths: Collection[int], longest: int, **settings: Any) -> "EngineConfig":
        """Sized for a job that is known: no longer, and no more at once, than it needs.

        Args:
          lengths: most tokens of each sequence, prompt and completion together.
          longest: the model's longest sequence.
          **settings: others; they come first.
        """
        # Powers of two, so that jobs alike run the same programs.
        power = 1 << (max([16, *lengths]) - 1).bit_length()
        rows = 1 << (max(1, len(lengths)) - 1).bit_length()
        return cls(**{"max_length": min(power, longest), "max_running": min(rows, cls.max_running)} | settings)
