"""What the scheduler counts, and what it holds."""

import dataclasses


@dataclasses.dataclass
class Statistics:
    """Counts since the start, in tokens where nothing else is said.

    Attributes:
      steps: dispatches.
      prompt: of prompts, per sample, that were admitted for the first time.
      cached: of those, found in the cache.
      prefilled: fed otherwise than one by one, what preemption made necessary included.
      decoded: drawn.
      drafted: guessed, and fed.
      accepted: of those, right, and kept.
      preemptions: sequences that lost their pages.
      peak_pages: most pages that sequences held at once.
      failed: requests that ended because something went wrong with them alone.
      compilations: programs that steps had to wait for, since the warm-up.
    """

    steps: int = 0
    prompt: int = 0
    cached: int = 0
    prefilled: int = 0
    decoded: int = 0
    drafted: int = 0
    accepted: int = 0
    preemptions: int = 0
    peak_pages: int = 0
    failed: int = 0
    compilations: int = 0


@dataclasses.dataclass(frozen=True)
class Load:
    """At one moment: sequences that run and that wait, pages that sequences hold, and how many pages there are."""

    running: int
    waiting: int
    held_pages: int
    pages: int
