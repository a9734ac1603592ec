"""How ``implementation="auto"`` chooses, and what it says when it has to pass a kernel over."""

import functools
from collections.abc import Callable, Mapping

import jax
from absl import logging


def choose(op: str, candidates: Mapping[str, Callable[[], str | None]]) -> str:
    """The first implementation that supports the case; one logged line per reason for those before it.

    Args:
      op: the public function's name.
      candidates: implementations from the most to the least wanted, each with a function that says why it does not
        support the case, or ``None`` if it does. The last is taken without asking.
    """
    *wanted, last = candidates
    for name in wanted:
        reason = candidates[name]()
        if reason is None:
            return name
        _say(op, name, last, reason)
    return last


@functools.cache
def _say(op: str, name: str, last: str, reason: str) -> None:
    if jax.process_index() == 0:  # of several, one tells
        logging.warning("%s: implementation=%r instead of %r: %s", op, last, name, reason)
