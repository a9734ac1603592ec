"""Computed pages by the tokens that lead to them: a radix tree whose edges are whole pages."""

import heapq
import itertools
from collections.abc import Iterator, Sequence

from ml.serve.scheduling.pages import PagePool


class Node:
    """An edge of the tree and the place where it ends.

    Attributes:
      parent: the node above; ``None``: a root.
      start: pages above it.
      keys: the tokens of each of its pages.
      pages: the pages; the tree holds a reference to each.
      children: by the tokens of their first page.
      locks: running sequences that lie at or below it.
      last_use: when the last lock was taken or given back.
    """

    __slots__ = ("children", "keys", "last_use", "locks", "pages", "parent", "salt", "start")

    def __init__(self, parent: "Node | None", start: int, keys: list[bytes], pages: list[int], salt: str):
        self.parent, self.start, self.keys, self.pages, self.salt = parent, start, keys, pages, salt
        self.children: dict[bytes, Node] = {}
        self.locks = 0
        self.last_use = 0

    @property
    def end(self) -> int:
        """Pages from the root to its end."""
        return self.start + len(self.pages)

    @property
    def evictable(self) -> bool:
        """Whether its last pages may go: nobody needs them, and nothing hangs below."""
        return not self.locks and not self.children and self.parent is not None


class PrefixTree:
    """Finds, for a list of tokens, the pages in which its beginning has been computed already.

    The tree holds one reference to each of its pages. A sequence locks the path to the node where its own known pages
    end, so that nothing on it is evicted; by this, pages of nodes without locks have no holder but the tree. The
    leaf used least recently is evicted first, from its end.
    """

    def __init__(self, pool: PagePool):
        self.pool = pool
        self._roots: dict[str, Node] = {}
        self._clock = itertools.count(1)
        self._order = itertools.count()
        # Candidates for eviction by last use; entries that no longer hold are passed over.
        self._candidates: list[tuple[int, int, Node]] = []
        self.size = 0
        self.evictable = 0

    def peek(self, salt: str, keys: Sequence[bytes]) -> int:
        """Number of leading pages that the tree has; changes nothing."""
        node = self._roots.get(salt)
        found = 0
        while node is not None:
            common = _common(node.keys, keys, found)
            found += common
            if common < len(node.keys) or found == len(keys):
                break
            node = node.children.get(keys[found])
        return found

    def acquire(self, salt: str, keys: Sequence[bytes]) -> tuple[Node, list[int]]:
        """Finds the longest known prefix, locks it, and adds the caller's reference to its pages.

        Args:
          salt: names the tree.
          keys: tokens of each full page.

        Returns:
          Where the prefix ends, and its pages.
        """
        node = self._roots.get(salt)
        if node is None:
            node = self._roots[salt] = Node(None, 0, [], [], salt)
        pages: list[int] = []
        while len(pages) < len(keys):
            child = node.children.get(keys[len(pages)])
            if child is None:
                break
            node = self._cut(child, _common(child.keys, keys, len(pages)))
            pages += node.pages
        self._lock(node)
        self.pool.hold(pages)
        return node, pages

    def publish(self, node: Node, keys: Sequence[bytes], pages: Sequence[int]) -> tuple[Node, list[int]]:
        """Adds pages below a node that the caller has locked; the lock moves down to their end.

        Pages that another sequence has published meanwhile are given up for that one's: the caller's reference moves.

        Args:
          node: where the caller's known pages end.
          keys: tokens of each new page; the pages are computed and will not be written again.
          pages: the pages, to which the caller holds references.

        Returns:
          Where they end, and the pages by which the caller has to go on.
        """
        kept: list[int] = []
        while len(kept) < len(keys):
            done = len(kept)
            child = node.children.get(keys[done])
            if child is None:
                self.pool.hold(pages[done:])
                node = self._append(node, list(keys[done:]), list(pages[done:]))
                return node, kept + list(pages[done:])
            child = self._cut(child, _common(child.keys, keys, done))
            if not child.locks:
                self.evictable -= len(child.pages)
            child.locks += 1
            child.last_use = next(self._clock)
            self.pool.hold(child.pages)
            self.pool.release(pages[done : done + len(child.pages)])
            kept += child.pages
            node = child
        return node, kept

    def release(self, node: Node, keep: int | None = None) -> None:
        """Gives back a lock.

        Args:
          node: the one that the caller has locked.
          keep: leading pages that someone may want again; those beyond go at once if no other sequence needs them.
            ``None``: all stay until their room is needed.
        """
        now = next(self._clock)
        above: Node | None = node
        while above is not None:
            above.locks -= 1
            above.last_use = now
            if not above.locks:
                self.evictable += len(above.pages)
            above = above.parent
        if keep is not None:
            while node.evictable and node.end > keep:
                parent = node.parent
                self._shorten(node, min(len(node.pages), node.end - keep))
                if not node.pages:
                    assert parent is not None
                    node = parent
        self._offer(node)

    def evict(self, count: int) -> int:
        """Frees up to ``count`` pages, those used least recently first; returns how many."""
        freed = 0
        while freed < count and self._candidates:
            last_use, _, node = heapq.heappop(self._candidates)
            if not node.evictable or not node.pages or last_use != node.last_use:
                continue
            parent, taken = node.parent, min(count - freed, len(node.pages))
            self._shorten(node, taken)
            freed += taken
            self._offer(node if node.pages or parent is None else parent)
        return freed

    def clear(self) -> None:
        """Forgets everything.

        Raises:
          RuntimeError: a sequence still has a lock.
        """
        if any(root.locks for root in self._roots.values()):
            raise RuntimeError("the prefix tree is in use")
        for node in list(self.nodes()):
            self.pool.release(node.pages)
        self._roots, self._candidates = {}, []
        self.size = self.evictable = 0

    def nodes(self) -> Iterator[Node]:
        """All nodes, parents before children."""
        pending = list(self._roots.values())
        while pending:
            node = pending.pop()
            yield node
            pending += node.children.values()

    def _lock(self, node: Node) -> None:
        now = next(self._clock)
        above: Node | None = node
        while above is not None:
            if not above.locks:
                self.evictable -= len(above.pages)
            above.locks += 1
            above.last_use = now
            above = above.parent

    def _cut(self, node: Node, length: int) -> Node:
        """Makes a node end after ``length`` of its pages; what is below it, locks included, stays as it is."""
        if length == len(node.pages):
            return node
        parent = node.parent
        assert parent is not None and length
        upper = Node(parent, node.start, node.keys[:length], node.pages[:length], node.salt)
        upper.locks, upper.last_use = node.locks, node.last_use
        node.parent, node.start = upper, node.start + length
        del node.keys[:length], node.pages[:length]
        upper.children[node.keys[0]] = node
        parent.children[upper.keys[0]] = upper
        return upper

    def _append(self, node: Node, keys: list[bytes], pages: list[int]) -> Node:
        """Adds pages below a node that the caller has locked."""
        self.size += len(pages)
        if node.parent is not None and not node.children and node.locks == 1:
            # Nobody else ends here: a sequence that grows page by page stays one node.
            node.keys += keys
            node.pages += pages
            return node
        child = Node(node, node.end, keys, pages, node.salt)
        child.locks, child.last_use = 1, next(self._clock)
        node.children[keys[0]] = child
        return child

    def _shorten(self, node: Node, count: int) -> None:
        """Drops the last pages of an evictable node; without any left it is gone."""
        assert node.parent is not None
        first = node.keys[0]
        self.pool.release(node.pages[-count:])
        del node.pages[-count:], node.keys[-count:]
        self.size -= count
        self.evictable -= count
        if not node.pages:
            del node.parent.children[first]

    def _offer(self, node: Node) -> None:
        """Notes a node for eviction, if it may be evicted; forgets a root without use."""
        if node.parent is None:
            if not node.children and not node.locks:
                self._roots.pop(node.salt, None)
        elif node.evictable:
            heapq.heappush(self._candidates, (node.last_use, next(self._order), node))
            if len(self._candidates) > 2 * self.size + 64:
                self._candidates = [entry for entry in self._candidates if _current(entry)]
                heapq.heapify(self._candidates)


def _current(entry: tuple[int, int, Node]) -> bool:
    last_use, _, node = entry
    return node.evictable and bool(node.pages) and last_use == node.last_use


def _common(edge: list[bytes], keys: Sequence[bytes], start: int) -> int:
    """How many pages of an edge equal the keys from ``start`` on."""
    there = keys[start : start + len(edge)]
    if len(there) == len(edge) and edge == there:  # the usual case, at the speed of C
        return len(edge)
    return next((i for i, (a, b) in enumerate(zip(edge, there, strict=False)) if a != b), min(len(edge), len(there)))
