"""The order in which to run a job whose prompts are all known (Zheng et al. 2024, BatchLLM)."""

import dataclasses
from collections.abc import Sequence as SequenceOf
from typing import Any

from ml.errors import UserError
from ml.serve.scheduling import prompt_tree
from ml.serve.scheduling.policies import Fifo
from ml.serve.scheduling.prompt_tree import Prefix
from ml.serve.scheduling.request import Request, Sequence


@dataclasses.dataclass(frozen=True)
class Plan:
    """An order of requests, and what they share on the way.

    Attributes:
      order: numbers of the requests, those of a group one after the other.
      prefix: per request, in their own numbering, the innermost prefix that it shares.
      root: of the tree of prefixes; its children are the groups.
      prompt: tokens of all prompts, each counted once however many samples are drawn.
      saved: of these, how many need not be computed, if each prefix is computed once.
    """

    order: tuple[int, ...]
    prefix: tuple[Prefix, ...]
    root: Prefix
    prompt: int
    saved: int


def plan(requests: SequenceOf[Request], page_size: int, *, levels: int | None = None, least_saved: int = 1) -> Plan:
    """Plans a job: what is shared runs together, so that no prefix is computed twice, or kept when it has had its use.

    Groups, within them the groups of the next level, and so on, go by how much they decode for what they prefill, most
    first: long decodes begin early, and prompts that come later fill the steps beside them. A prefix counts once.

    Args:
      requests: all of the job.
      page_size: tokens in a page.
      levels: ``None``: share on as many levels as there are; 1: the paper's first level, enlarged.
      least_saved: tokens that sharing a prefix must save to be worth its place. Times the bytes of a token in the cache
        these are the bytes saved.

    Raises:
      UserError: two requests have the same id, or ``levels`` is another number.
    """
    if levels not in (None, 1):
        raise UserError(f"levels={levels}: must be 1 or None (as many as there are)")
    ids = [request.id for request in requests]
    if len(set(ids)) < len(ids):
        twice = next(id for id in ids if ids.count(id) > 1)
        raise UserError(f"request {twice!r}: id: is given twice in the job; ids must differ")
    root = prompt_tree.build(requests, page_size)
    prompt_tree.drop(root, least_saved)
    if levels == 1:
        prompt_tree.enlarge_first_level(root)
    prefixes: dict[int, Prefix] = {number: prefix for prefix in root.walk() for number in prefix.members}
    return Plan(
        order=tuple(_order(root, requests)),
        prefix=tuple(prefixes[number] for number in range(len(requests))),
        root=root,
        prompt=sum(len(request.tokens) for request in requests),
        saved=sum(prefix.saved for prefix in root.walk()),
    )


def _order(root: Prefix, requests: SequenceOf[Request]) -> list[int]:
    """Members and children of each prefix by decoded tokens per prefilled token; equals stay in the job's order."""
    work: dict[Prefix, tuple[int, int, int]] = {}  # decoded, prefilled, first number
    entries: dict[Prefix, list[tuple[float, int, Prefix | None]]] = {}
    for prefix in reversed(list(root.walk())):
        decoded, prefilled, first = 0, prefix.size, len(requests)
        entries[prefix] = []
        for number in prefix.members:
            request = requests[number]
            own = (request.likely_tokens * request.n, len(request.tokens) - prefix.end)
            decoded, prefilled, first = decoded + own[0], prefilled + own[1], min(first, number)
            entries[prefix].append((-own[0] / own[1], number, None))
        for child in prefix.children:
            below = work[child]
            decoded, prefilled, first = decoded + below[0], prefilled + below[1], min(first, below[2])
            entries[prefix].append((-below[0] / below[1], below[2], child))
        work[prefix] = (decoded, prefilled, first)
        entries[prefix].sort(key=lambda entry: entry[:2])
    order: list[int] = []
    pending: list[Prefix | int] = [root]
    while pending:
        here = pending.pop()
        if isinstance(here, int):
            order.append(here)
        else:
            pending += [number if child is None else child for _, number, child in reversed(entries[here])]
    return order


class Planned(Fifo):
    """Admits in the order of a plan, and frees each prefix when its last user has ended."""

    def __init__(self, requests: SequenceOf[Request], plan: Plan):
        """For the requests that were planned, in the same order; others come after them, as they arrive."""
        self._position = {requests[number].id: place for place, number in enumerate(plan.order)}
        self._prefix = {request.id: prefix for request, prefix in zip(requests, plan.prefix, strict=True)}
        self._samples = {request.id: request.n for request in requests}
        self._users = {prefix: prefix.users for prefix in plan.root.walk()}

    def rank(self, sequence: Sequence, number: int) -> tuple[Any, ...]:
        """See `Fifo.rank`."""
        request = sequence.request
        place = self._position.get(request.id, len(self._position) + number)
        return (request.priority, place, number, sequence.index)

    def publishable(self, sequence: Sequence) -> int | None:
        """See `Fifo.publishable`: what the plan shares, and the prompt for the request's other samples."""
        request = sequence.request
        if request.id not in self._prefix:
            return None
        return len(request.tokens) if request.n > 1 else self._prefix[request.id].end

    def end(self, sequence: Sequence) -> int | None:
        """See `Fifo.end`."""
        request = sequence.request
        if request.id not in self._prefix:
            return None
        self._samples[request.id] -= 1
        if self._samples[request.id]:
            return len(request.tokens)
        prefix: Prefix | None = self._prefix[request.id]
        keep = 0
        while prefix is not None:
            self._users[prefix] -= 1
            keep = max(keep, prefix.end) if self._users[prefix] else keep
            prefix = prefix.parent
        return keep
