"""All prompts of a job in one tree, and which of the beginnings that they share are kept."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from ml.serve.scheduling.request import Request


@dataclasses.dataclass(eq=False)
class Prefix:
    """A run of whole pages with which several prompts go on in the same way; the root is empty.

    Attributes:
      begin: first token.
      end: one past its last.
      parent: the one before it.
      children: those that go on from it.
      members: prompts, by number, that go on from it alone.
      users: prompts below it.
    """

    begin: int
    end: int
    parent: "Prefix | None" = None
    children: "list[Prefix]" = dataclasses.field(default_factory=list)
    members: list[int] = dataclasses.field(default_factory=list)
    users: int = 0

    @property
    def size(self) -> int:
        """Tokens."""
        return self.end - self.begin

    @property
    def saved(self) -> int:
        """Tokens that need not be computed again if it is computed once for all its users."""
        return (self.users - 1) * self.size

    def walk(self) -> "Iterator[Prefix]":
        """Itself and all below, parents before children."""
        pending = [self]
        while pending:
            prefix = pending.pop()
            yield prefix
            pending += reversed(prefix.children)


def build(requests: Sequence[Request], page_size: int) -> Prefix:
    """Finds everything that prompts share in whole pages, over any number of levels.

    Prompts of different salts share nothing, and the last token of a prompt, computed for its logits, is never shared.

    Args:
      requests: their prompts; they are numbered in this order.
      page_size: tokens in a page.

    Returns:
      The root.
    """
    # Most significant byte first, so that comparing bytes is comparing tokens.
    keys = [(request.salt, np.asarray(request.tokens).astype(">u4").tobytes()) for request in requests]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    common = [_common(requests[a], requests[b], page_size) for a, b in itertools.pairwise(order)]
    root = Prefix(0, 0)
    path = [root]  # of the prompt before
    for number, before, after in zip(order, [0, *common], [*common, 0], strict=False):
        while path[-1].end > before:
            deeper = path.pop()
            if path[-1].end < before:  # the path forks within an edge
                middle = Prefix(0, before, path[-1], [deeper])
                path[-1].children[-1] = deeper.parent = middle
                path.append(middle)
        if after > path[-1].end:
            path.append(Prefix(0, after, path[-1]))
            path[-2].children.append(path[-1])
        path[-1].members.append(number)
    for prefix in root.walk():
        prefix.begin = 0 if prefix.parent is None else prefix.parent.end
    _count_users(root)
    return root


def drop(root: Prefix, least: int) -> None:
    """Gives up prefixes that save less than so many tokens; their tokens go to their children.

    Args:
      root: changed in place.
      least: tokens.
    """
    for parent in root.walk():
        pending, kept = parent.children[::-1], []
        while pending:
            child = pending.pop()
            # What a child lost goes to those below it, and counts there.
            child.begin, child.parent = parent.end, parent
            if child.saved >= least:
                kept.append(child)
            else:
                parent.members += child.members
                pending += reversed(child.children)
        parent.children = kept


def enlarge_first_level(root: Prefix) -> None:
    """Chooses the prefixes for sharing on one level only (Zheng et al. 2024, BatchLLM, section 4.2).

    From the leaves up, a grandchild becomes a child, with its parent's tokens before its own, if what its own tokens
    save exceeds the cost of computing its parent's tokens once more. What is left below the first level is not shared.

    Args:
      root: changed in place.
    """
    for node in reversed(list(root.walk())):
        children = []
        for child in node.children:
            staying = []
            for grandchild in child.children:
                if grandchild.saved > child.size:
                    grandchild.begin, grandchild.parent = child.begin, node
                    child.users -= grandchild.users
                    children.append(grandchild)
                else:
                    staying.append(grandchild)
            child.children = staying
            if len(staying) + len(child.members) > 1:
                children.append(child)
            elif staying:  # nothing branches here any more
                staying[0].begin, staying[0].parent = child.begin, node
                children.append(staying[0])
            else:
                node.members += child.members
        node.children = children
    for group in root.children:
        group.members = [number for prefix in group.walk() for number in prefix.members]
        group.children = []


def _count_users(root: Prefix) -> None:
    for prefix in reversed(list(root.walk())):
        prefix.users = len(prefix.members) + sum(child.users for child in prefix.children)


def _common(a: Request, b: Request, page_size: int) -> int:
    if a.salt != b.salt:
        return 0
    length = min(len(a.tokens), len(b.tokens))
    different = np.asarray(a.tokens)[:length] != np.asarray(b.tokens)[:length]
    common = int(different.argmax()) if different.any() else length
    return min(common, length - 1) // page_size * page_size
