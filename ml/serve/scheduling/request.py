"""What a user asks for, and how far each of its samples has come."""

import array
import dataclasses
import enum
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

from ml.errors import UserError

if TYPE_CHECKING:
    from ml.serve.scheduling.prefix_tree import Node


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """One prompt, and what limits its completions. How tokens are drawn from logits is no concern of the scheduler.

    Attributes:
      id: names it; unique among the requests that are not finished.
      prompt: token ids, at least one.
      max_tokens: most tokens to draw per sample.
      n: samples to draw (of which a caller may keep the best).
      priority: smaller goes first.
      arrival: when it came, in any unit; between equals, the order of `Scheduler.add` decides.
      stop_ids: tokens that end a sample; they are counted among its tokens.
      salt: requests share cached tokens only with those of the same salt (a tenant, an adapter).
      expected_tokens: estimate of what a sample will draw; ``None``: ``max_tokens``.
      reuse_prefix: whether cached tokens of the prompt may be used; not if its logits are asked for.
      token_by_token: whether the host must see each token before the next is drawn (a grammar); such a request is
        not planned ahead of the device.
      speculate: whether several of its tokens may be drawn at once, where guesses of them turn out right; one that is
        ``token_by_token`` never does.
    """

    id: str
    prompt: Iterable[int]
    max_tokens: int
    n: int = 1
    priority: int = 0
    arrival: float = 0.0
    stop_ids: Collection[int] = ()
    salt: str = ""
    expected_tokens: int | None = None
    reuse_prefix: bool = True
    token_by_token: bool = False
    speculate: bool = True

    def __post_init__(self):
        object.__setattr__(self, "prompt", array.array("i", self.prompt))
        object.__setattr__(self, "stop_ids", frozenset(self.stop_ids))
        if not self.tokens:
            raise UserError(f"request {self.id!r}: prompt: is empty; give at least one token")
        for field in ("max_tokens", "n"):
            if getattr(self, field) < 1:
                raise UserError(f"request {self.id!r}: {field}={getattr(self, field)}: must be at least 1")

    @property
    def tokens(self) -> "array.array[int]":
        """The prompt."""
        return self.prompt  # type: ignore[return-value]

    @property
    def likely_tokens(self) -> int:
        """Tokens that a sample will likely draw: at least one, at most ``max_tokens``."""
        expected = self.max_tokens if self.expected_tokens is None else self.expected_tokens
        return max(1, min(self.max_tokens, expected))


class State(enum.Enum):
    """Of a sequence."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"  # waits again, and computes anew what the cache no longer holds
    FINISHED = "finished"


class FinishReason(enum.StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    FAILED = "failed"


class Sequence:
    """One sample of a request.

    Positions below ``computed`` are in the cache once the steps that were handed out have run. Tokens drawn by steps
    whose results are not here yet are ``pending``: they count in positions, but nobody here knows them.

    Attributes:
      request: what it is a sample of.
      index: which of the request's samples; those above 0 borrow what sample 0 computed.
      rank: its place among all: smaller is admitted first and preempted last.
      tokens: prompt and drawn tokens, as far as they are known.
      pending: drawn tokens that are not known yet.
      computed: leading tokens whose keys and values are, or are being, computed.
      cached: leading tokens of the prompt that were in the cache when it was first admitted.
      table: pages, in order.
      published: leading pages that the prefix tree has.
      node: where they end in the prefix tree, while running.
      slot: a number below the most that may run, its own while it runs; -1: none.
    """

    __slots__ = (
        "_chain",
        "_keys",
        "cached",
        "computed",
        "finish_reason",
        "index",
        "node",
        "parent",
        "pending",
        "published",
        "rank",
        "request",
        "slot",
        "state",
        "table",
        "tokens",
        "waiting_since",
    )

    def __init__(self, request: Request, index: int = 0, parent: "Sequence | None" = None, rank: tuple[Any, ...] = ()):
        self.request, self.index, self.parent, self.rank = request, index, parent, rank
        self.tokens = request.tokens[:]
        self.state = State.WAITING
        self.finish_reason: FinishReason | None = None
        self.pending = self.computed = self.cached = self.published = 0
        self.table = array.array("i")
        self.node: Node | None = None
        self.slot = -1
        self.waiting_since = 0
        self._keys: list[bytes] = []
        self._chain: list[int] = []

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request.id!r}#{self.index}, {self.state.value}, {self.computed} computed of "
            f"{len(self.tokens)}+{self.pending})"
        )

    @property
    def output(self) -> list[int]:
        """Tokens drawn so far, as far as they are known."""
        return self.tokens[len(self.request.tokens) :].tolist()

    @property
    def drawn(self) -> int:
        """Tokens drawn so far, known or not."""
        return len(self.tokens) + self.pending - len(self.request.tokens)

    @property
    def remaining(self) -> int:
        """Tokens that may still be drawn."""
        return self.request.max_tokens - self.drawn

    @property
    def uncomputed(self) -> int:
        """Tokens, known or not, that have yet to go through the model; 1 while decoding."""
        return len(self.tokens) + self.pending - self.computed

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self.state is State.FINISHED

    def page_keys(self, page_size: int) -> list[bytes]:
        """The tokens of each page that is full of known tokens."""
        for i in range(len(self._keys), len(self.tokens) // page_size):
            key = self.tokens[i * page_size : (i + 1) * page_size].tobytes()
            self._keys.append(key)
            self._chain.append(hash((self._chain[-1] if i else self.request.salt, key)))
        return self._keys

    def page_hash(self, page: int, page_size: int) -> int:
        """A hash of everything up to the end of a page."""
        self.page_keys(page_size)
        return self._chain[page]
