"""The block tables of sequences: found in the prefix tree, grown, copied before writing, published, given back."""

from ml.serve.scheduling.pages import PagePool
from ml.serve.scheduling.prefix_tree import PrefixTree
from ml.serve.scheduling.request import Sequence


class CacheMemory:
    """The pool of pages and the prefix tree, as sequences see them.

    Every page is either available at once, evictable (only the prefix tree holds it), or held by a sequence.
    """

    def __init__(self, pages: int, page_size: int):
        self.pool = PagePool(pages, page_size)
        self.tree = PrefixTree(self.pool)

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return self.pool.page_size

    @property
    def available(self) -> int:
        """Pages that can be had without taking them from a sequence."""
        return self.pool.free + self.tree.evictable

    @property
    def held(self) -> int:
        """Pages in the block tables of sequences."""
        return self.pool.total - self.available

    def cached(self, sequence: Sequence) -> int:
        """Tokens of a waiting sequence that the prefix tree has."""
        limit = self._reusable(sequence)
        keys = sequence.page_keys(self.page_size)[:limit]
        return self.tree.peek(sequence.request.salt, keys) * self.page_size

    def next_page(self, sequence: Sequence) -> int | None:
        """A hash of the first page that the tree lacks, if the sequence could use it; ``None``: it could not."""
        found = self.cached(sequence) // self.page_size
        return sequence.page_hash(found, self.page_size) if found < self._reusable(sequence) else None

    def computing(self, sequence: Sequence, limit: int | None = None) -> int | None:
        """Likewise, the page that a running sequence will publish next; ``None``: none of its known tokens.

        Args:
          sequence: a running one.
          limit: as for `publish`.
        """
        length = len(sequence.tokens) if limit is None else min(limit, len(sequence.tokens))
        if sequence.published >= length // self.page_size:
            return None
        return sequence.page_hash(sequence.published, self.page_size)

    def open(self, sequence: Sequence) -> None:
        """Gives a sequence what is computed of it already, all but the last token at most.

        Samples other than the first also borrow the page in which the prompt ends, from the first if that still runs.
        """
        limit, last = self._reusable(sequence), len(sequence.tokens) - 1
        keys = sequence.page_keys(self.page_size)[:limit]
        sequence.node, pages = self.tree.acquire(sequence.request.salt, keys)
        sequence.table.extend(pages)
        sequence.published = len(pages)
        sequence.computed = len(pages) * self.page_size
        first = sequence.parent
        if first is None or sequence.drawn or first.computed < last or sequence.computed == last:
            return
        if len(pages) == last // self.page_size < len(first.table):
            borrowed = first.table[len(pages)]
            self.pool.hold([borrowed])
            sequence.table.append(borrowed)
            sequence.computed = last

    def missing(self, sequence: Sequence, stop: int) -> int:
        """Pages it takes to write positions from the first uncomputed one up to ``stop``."""
        table = sequence.table
        new = max(0, self.pool.pages_for(stop) - len(table))
        written = range(sequence.computed // self.page_size, min(len(table), self.pool.pages_for(stop)))
        return new + sum(self.pool.shared(table[i]) for i in written)

    def prepare(self, sequence: Sequence, stop: int) -> list[tuple[int, int]]:
        """Makes the positions from the first uncomputed one up to ``stop`` writable.

        Returns:
          Pages to copy, as ``(from, to)``: those that others hold too.
        """
        table, copies = sequence.table, []
        for i in range(sequence.computed // self.page_size, min(len(table), self.pool.pages_for(stop))):
            if self.pool.shared(table[i]):
                (page,) = self._allocate(1)
                copies.append((table[i], page))
                self.pool.release([table[i]])
                table[i] = page
        table.extend(self._allocate(max(0, self.pool.pages_for(stop) - len(table))))
        return copies

    def publish(self, sequence: Sequence, limit: int | None = None) -> None:
        """Lets others find the sequence's pages that are full, known and computed.

        Args:
          sequence: a running one.
          limit: leading tokens that others may want; ``None``: all.
        """
        full = min(sequence.computed, len(sequence.tokens))
        full = (full if limit is None else min(full, limit)) // self.page_size
        begin = sequence.published
        if full <= begin:
            return
        assert sequence.node is not None
        keys = sequence.page_keys(self.page_size)[begin:full]
        sequence.node, pages = self.tree.publish(sequence.node, keys, sequence.table[begin:full].tolist())
        for i, page in enumerate(pages, begin):
            sequence.table[i] = page
        sequence.published = full

    def close(self, sequence: Sequence, keep: int | None = None) -> None:
        """Takes all pages from a sequence; what was published stays: all, or no more than ``keep`` tokens."""
        assert sequence.node is not None
        self.pool.release(sequence.table)
        self.tree.release(sequence.node, None if keep is None else keep // self.page_size)
        del sequence.table[:]
        sequence.node = None
        sequence.computed = sequence.published = 0

    def _reusable(self, sequence: Sequence) -> int:
        """Most pages that it may take from others. The last token always runs, for its logits."""
        # Only the first sample shows the prompt's logits.
        if not sequence.request.reuse_prefix and not sequence.index:
            return 0
        return (len(sequence.tokens) - 1) // self.page_size

    def _allocate(self, count: int) -> list[int]:
        if count > self.pool.free:
            self.tree.evict(count - self.pool.free)
        return self.pool.allocate(count)
