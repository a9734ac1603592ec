"""References to pages are counted, and nothing is handed out twice."""

import pytest

from ml.errors import UserError
from ml.serve.scheduling.pages import PagePool


def test_pages_are_free_when_the_last_holder_lets_go():
    pool = PagePool(4, 8)
    pages = pool.allocate(3)
    assert len(set(pages)) == 3 and pool.free == 1
    pool.hold(pages[:1])
    assert pool.shared(pages[0]) and not pool.shared(pages[1])
    pool.release(pages)
    assert pool.free == 3 and not pool.shared(pages[0])
    pool.release(pages[:1])
    assert pool.free == 4
    assert sorted(pool.allocate(4)) == [0, 1, 2, 3]


def test_misuse_is_refused():
    pool = PagePool(2, 8)
    with pytest.raises(RuntimeError, match="3 pages asked for, 2 free"):
        pool.allocate(3)
    with pytest.raises(RuntimeError, match="released once too often"):
        pool.release([0])
    with pytest.raises(RuntimeError, match="is free"):
        pool.hold([1])
    with pytest.raises(UserError, match="pages=0"):
        PagePool(0, 8)
    with pytest.raises(UserError, match="page_size=0"):
        PagePool(1, 0)


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (8, 1), (9, 2)])
def test_pages_for_tokens(tokens, pages):
    assert PagePool(1, 8).pages_for(tokens) == pages
