"""Which of several replicas, each with a cache of its own, gets a request: where its prompt is, unless that is busy."""

import collections
import dataclasses
import heapq
from collections.abc import Sequence as SequenceOf

from ml.serve.scheduling import prompt_tree
from ml.serve.scheduling.prompt_tree import Prefix
from ml.serve.scheduling.request import Request, Sequence

# What cutting a group of requests must gain: a share of the tokens of the replica that has most.
_UNEVEN = 0.1


@dataclasses.dataclass(frozen=True)
class _Routed:
    """Where an unfinished request went, its tokens, and the hashes of its prompt's pages."""

    replica: int
    tokens: int
    hashes: tuple[int, ...]


class Router:
    """Routes requests that come one by one.

    A replica holds what its prefix tree has computed, and will hold what its unfinished requests have in their prompts.
    The one that holds most of a prompt gets it, unless it has more than twice the tokens to work on that another has,
    and ``slack`` tokens besides: sequences that decode together cost little more than one of them.
    """

    def __init__(self, replicas: int, page_size: int, slack: int):
        """For replicas without requests.

        Args:
          replicas: how many.
          page_size: tokens in a page of their caches.
          slack: tokens; a quarter of a cache is a good choice.
        """
        self.loads = [0] * replicas
        self._page_size, self._slack = page_size, slack
        self._routed: dict[str, _Routed] = {}
        self._pages: list[collections.Counter[int]] = [collections.Counter() for _ in range(replicas)]

    def where(self, request_id: str) -> int | None:
        """The replica of an unfinished request; ``None``: there is no such request."""
        routed = self._routed.get(request_id)
        return None if routed is None else routed.replica

    def choose(self, request: Request, cached: SequenceOf[int]) -> int:
        """The replica for a request.

        Args:
          request: a new one.
          cached: tokens of its prompt that each replica's prefix tree has.
        """
        hashes, replicas = self._hashes(request), range(len(self.loads))
        held = [max(cached[i], self._coming(i, hashes)) for i in replicas]
        home = min(replicas, key=lambda i: (-held[i], self.loads[i]))
        idlest = min(replicas, key=lambda i: (self.loads[i], -held[i]))
        busy = self.loads[home] > 2 * self.loads[idlest] + self._slack
        return idlest if busy or not held[home] else home

    def note(self, request: Request, replica: int) -> None:
        """Hears that a request went to a replica."""
        routed = _Routed(replica, _tokens(request), self._hashes(request))
        self._routed[request.id] = routed
        self.loads[replica] += routed.tokens
        self._pages[replica].update(routed.hashes)

    def ended(self, request_id: str) -> None:
        """Hears that a request has ended."""
        routed = self._routed.pop(request_id)
        self.loads[routed.replica] -= routed.tokens
        pages = self._pages[routed.replica]
        pages.subtract(routed.hashes)
        for page in routed.hashes:
            if not pages[page]:
                del pages[page]

    def _hashes(self, request: Request) -> tuple[int, ...]:
        sequence = Sequence(request)
        reusable = (len(request.tokens) - 1) // self._page_size if request.reuse_prefix else 0
        return tuple(sequence.page_hash(i, self._page_size) for i in range(reusable))

    def _coming(self, replica: int, hashes: SequenceOf[int]) -> int:
        pages = self._pages[replica]
        return next((i for i, page in enumerate(hashes) if page not in pages), len(hashes)) * self._page_size


def deal(requests: SequenceOf[Request], page_size: int, loads: SequenceOf[int]) -> list[list[int]]:
    """Deals a job to replicas: what shares a prefix stays together, as far as all then have about as many tokens.

    The largest group goes first, to the replica that then has least. One that is too large for any is dealt in its
    parts, if computing its prefix wherever a part goes costs less than it helps.

    Args:
      requests: all of the job.
      page_size: tokens in a page.
      loads: tokens that each replica has to work on already.

    Returns:
      Numbers of the requests of each replica, in the job's order.
    """
    root = prompt_tree.build(requests, page_size)
    below = _tokens_below(root, requests)
    total = sum(loads) + below[root]
    replicas = [_Replica(load) for load in loads]
    # By size, the largest first; equals in the order in which they were found.
    units: list[tuple[int, int, Prefix | int, Prefix | None]] = [(-below[root], 0, root, None)]
    counter = 0
    while units:
        negative, _, unit, parent = heapq.heappop(units)
        path = _path(parent)
        loads = [replica.load_with(path) - negative for replica in replicas]
        least = min(range(len(replicas)), key=loads.__getitem__)
        if isinstance(unit, Prefix):
            # Cut in two, it leaves half of what follows its prefix elsewhere; nobody has less than an even share.
            parted = max(total / len(replicas), loads[least] - (below[unit] - unit.size) / 2)
            if loads[least] > (1 + _UNEVEN) * parted:
                parts: list[tuple[int, Prefix | int]] = [(below[child], child) for child in unit.children]
                parts += [(_tokens(requests[number]) - unit.end, number) for number in unit.members]
                for size, part in parts:
                    counter += 1
                    heapq.heappush(units, (-size, counter, part, unit))
                continue
        total += loads[least] - replicas[least].load + negative
        replicas[least].load = loads[least]
        replicas[least].held.update(path)
        replicas[least].numbers += (
            [unit] if isinstance(unit, int) else [n for each in unit.walk() for n in each.members]
        )
    return [sorted(replica.numbers) for replica in replicas]


@dataclasses.dataclass
class _Replica:
    """While a job is dealt: tokens, prefixes of which it has a part, and requests."""

    load: int
    held: set[Prefix] = dataclasses.field(default_factory=set)
    numbers: list[int] = dataclasses.field(default_factory=list)

    def load_with(self, path: SequenceOf[Prefix]) -> int:
        """Tokens if it also computes these prefixes."""
        return self.load + sum(prefix.size for prefix in path if prefix not in self.held)


def _tokens(request: Request) -> int:
    """To prefill and to decode, if nothing is cached."""
    return len(request.tokens) + request.likely_tokens * request.n


def _tokens_below(root: Prefix, requests: SequenceOf[Request]) -> dict[Prefix, int]:
    """Of each prefix, its own tokens and those of all that go on from it."""
    below: dict[Prefix, int] = {}
    for prefix in reversed(list(root.walk())):
        own = sum(_tokens(requests[number]) - prefix.end for number in prefix.members)
        below[prefix] = prefix.size + own + sum(below[child] for child in prefix.children)
    return below


def _path(prefix: Prefix | None) -> list[Prefix]:
    path = []
    while prefix is not None:
        path.append(prefix)
        prefix = prefix.parent
    return path
