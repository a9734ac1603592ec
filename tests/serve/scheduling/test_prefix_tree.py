"""The prefix tree against a plain dictionary of prefixes, and what it evicts."""

import numpy as np
import pytest

from ml.serve.scheduling.pages import PagePool
from ml.serve.scheduling.prefix_tree import PrefixTree


def keys_of(text: str) -> list[bytes]:
    """One page per letter."""
    return [letter.encode() for letter in text]


class Holder:
    """What a sequence does with the tree: match, compute the rest, publish, let go."""

    def __init__(self, tree: PrefixTree, text: str, salt: str = ""):
        self.tree, self.text = tree, text
        self.node, self.pages = tree.acquire(salt, keys_of(text))
        self.matched = len(self.pages)

    def publish(self, text: str | None = None) -> "Holder":
        self.text = text or self.text
        published = len(self.pages)
        own = self.tree.pool.allocate(len(self.text) - published)
        self.node, kept = self.tree.publish(self.node, keys_of(self.text)[published:], own)
        self.pages += kept
        return self

    def release(self, keep: int | None = None) -> None:
        self.tree.pool.release(self.pages)
        self.tree.release(self.node, keep)


def check(tree: PrefixTree, holders: list[Holder]) -> None:
    """Recounts everything from the nodes and the holders."""
    nodes = [node for node in tree.nodes() if node.parent is not None]
    references = [0] * tree.pool.total
    for pages in [*(node.pages for node in nodes), *(holder.pages for holder in holders)]:
        for page in pages:
            references[page] += 1
    assert references == tree.pool.references
    locks = {id(node): 0 for node in tree.nodes()}
    for holder in holders:
        node = holder.node
        while node is not None:
            locks[id(node)] += 1
            node = node.parent
    for node in tree.nodes():
        assert node.locks == locks[id(node)]
        assert len(node.keys) == len(node.pages) and (node.pages or node.parent is None)
        assert node.parent is None or (node.start == node.parent.end and node.parent.children[node.keys[0]] is node)
    assert tree.size == sum(len(node.pages) for node in nodes)
    only_tree = [page for node in nodes for page in node.pages if tree.pool.references[page] == 1]
    assert tree.evictable == len(only_tree) == sum(len(node.pages) for node in nodes if not node.locks)
    held = {page for holder in holders for page in holder.pages}
    assert tree.pool.free + tree.evictable + len(held) == tree.pool.total


def test_a_prefix_is_found_in_whole_pages_and_per_salt():
    tree = PrefixTree(PagePool(16, 4))
    first = Holder(tree, "abcd").publish()
    assert tree.peek("", keys_of("abxy")) == 2 and tree.peek("", keys_of("x")) == 0
    assert tree.peek("other", keys_of("abcd")) == 0
    second = Holder(tree, "abxy")
    assert second.pages == first.pages[:2]
    other = Holder(tree, "abcd", salt="other")
    assert other.matched == 0
    check(tree, [first, second, other])
    for holder in (first, second, other):
        holder.release()
    check(tree, [])
    assert tree.evictable == 4


def test_pages_computed_twice_are_kept_once():
    tree = PrefixTree(PagePool(16, 4))
    first, second, third = Holder(tree, "abc"), Holder(tree, "abcd"), Holder(tree, "abq")
    first.publish()
    assert tree.pool.free == 13
    second.publish()
    assert second.pages[:3] == first.pages and tree.pool.free == 12
    third.publish()
    assert third.pages[:2] == first.pages[:2] and tree.pool.free == 11
    check(tree, [first, second, third])


def test_a_growing_sequence_stays_one_node():
    tree = PrefixTree(PagePool(16, 4))
    holder = Holder(tree, "ab").publish()
    for text in ("abc", "abcd", "abcde"):
        holder.publish(text)
    assert len(list(tree.nodes())) == 2
    other = Holder(tree, "abcde")  # ends here too, so what comes next is no longer common
    holder.publish("abcdef")
    assert len(list(tree.nodes())) == 3 and other.node.end == 5
    check(tree, [holder, other])


def test_the_leaf_used_least_recently_goes_first_and_from_its_end():
    tree = PrefixTree(PagePool(8, 4))
    for text in ("abc", "abxy", "q"):
        Holder(tree, text).publish().release()
    Holder(tree, "abc").release()  # used again
    check(tree, [])
    assert tree.evict(1) == 1 and tree.peek("", keys_of("abxy")) == 3
    assert tree.evict(2) == 2 and tree.peek("", keys_of("abxy")) == 2 and tree.peek("", keys_of("q")) == 0
    assert tree.peek("", keys_of("abc")) == 3
    locked = Holder(tree, "ab")
    assert tree.evict(9) == 1 and tree.peek("", keys_of("abc")) == 2
    locked.release()
    assert tree.evict(9) == 2 and tree.pool.free == 8 and not list(tree.nodes())


def test_use_ends_with_the_release():
    tree = PrefixTree(PagePool(8, 4))
    first, second = Holder(tree, "a").publish(), Holder(tree, "b").publish()
    second.release()
    first.release()
    assert tree.evict(1) == 1 and tree.peek("", keys_of("a")) == 1


def test_candidates_for_eviction_do_not_pile_up():
    tree = PrefixTree(PagePool(8, 4))
    Holder(tree, "abc").publish().release()
    for _ in range(1000):
        Holder(tree, "abc").release()
    assert len(tree._candidates) < 100
    assert tree.evict(9) == 3


def test_what_nobody_will_want_again_goes_at_once():
    tree = PrefixTree(PagePool(8, 4))
    first, second = Holder(tree, "abcd").publish(), Holder(tree, "abxy").publish()
    first.release(keep=1)
    check(tree, [second])
    assert tree.peek("", keys_of("abcd")) == 2, "the second still needs two pages"
    second.release(keep=1)
    check(tree, [])
    assert tree.size == 1
    Holder(tree, "a").release(keep=0)
    assert tree.pool.free == 8


def test_clear():
    tree = PrefixTree(PagePool(8, 4))
    holder = Holder(tree, "abcd").publish()
    with pytest.raises(RuntimeError, match="in use"):
        tree.clear()
    holder.release()
    tree.clear()
    check(tree, [])
    assert tree.pool.free == 8


@pytest.mark.parametrize("seed", range(8))
def test_random_sequences_of_events(seed):
    rng = np.random.default_rng(seed)
    tree = PrefixTree(PagePool(40, 4))
    holders: list[Holder] = []
    for _ in range(600):
        event = rng.integers(5)
        if event == 0 and len(holders) < 6:
            text = "".join(rng.choice(list("ab"), rng.integers(1, 7)))
            salt = str(rng.choice(["", "s"]))
            expected = tree.peek(salt, keys_of(text))
            holders.append(Holder(tree, text, salt))
            assert holders[-1].matched == expected
        elif event == 1 and holders:
            holder = holders[rng.integers(len(holders))]
            text = holder.text + "".join(rng.choice(list("ab"), rng.integers(0, 2)))
            missing = len(text) - len(holder.pages) - tree.pool.free
            if missing <= 0 or tree.evict(missing) == missing:
                holder.publish(text)
        elif event == 2 and holders:
            holders.pop(rng.integers(len(holders))).release()
        elif event == 3 and holders:
            holders.pop(rng.integers(len(holders))).release(keep=int(rng.integers(4)))
        elif event == 4:
            before, wanted = tree.evictable, int(rng.integers(4))
            assert tree.evict(wanted) == min(before, wanted)
        check(tree, holders)
