"""The pages of the key/value cache: who holds how many references to each."""

from collections.abc import Iterable

from ml.errors import UserError


class PagePool:
    """Counts references to pages. A page that nobody refers to is free; one with several holders must not be written.

    Holders are the sequences whose block tables name a page, and the prefix tree.
    """

    def __init__(self, pages: int, page_size: int):
        """All ``pages``, of ``page_size`` tokens each, are free.

        Raises:
          UserError: there are none, or they are empty.
        """
        if pages < 1:
            raise UserError(f"pages={pages}: the cache has no room; give it memory for at least one page")
        if page_size < 1:
            raise UserError(f"page_size={page_size}: must be at least 1, often 64")
        self.total, self.page_size = pages, page_size
        self.references = [0] * pages
        self._free = list(range(pages - 1, -1, -1))  # a stack: pages used of late are near in the device's caches

    @property
    def free(self) -> int:
        """Pages that nobody refers to."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Hands out free pages, each with one reference.

        Raises:
          RuntimeError: so many are not free; the caller has to see to it.
        """
        if count > len(self._free):
            raise RuntimeError(f"{count} pages asked for, {len(self._free)} free")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self.references[page] = 1
        return pages

    def hold(self, pages: Iterable[int]) -> None:
        """Adds a reference to each."""
        for page in pages:
            if not self.references[page]:
                raise RuntimeError(f"page {page} is free, and cannot be shared")
            self.references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Drops a reference to each; those without any left are free."""
        for page in pages:
            if not self.references[page]:
                raise RuntimeError(f"page {page} is released once too often")
            self.references[page] -= 1
            if not self.references[page]:
                self._free.append(page)

    def shared(self, page: int) -> bool:
        """Whether it has several holders, and so must be copied before it is written."""
        return self.references[page] > 1

    def pages_for(self, tokens: int) -> int:
        """Pages that so many tokens take."""
        return -(-tokens // self.page_size)
