"""What prompts share, against counting the prefixes of each."""

import collections

import numpy as np
import pytest

from ml.serve.scheduling import Request
from ml.serve.scheduling.prompt_tree import Prefix, build, drop, enlarge_first_level


def requests_of(prompts, salts=None) -> list[Request]:
    salts = salts or [""] * len(prompts)
    return [Request(str(i), p, 1, salt=s) for i, (p, s) in enumerate(zip(prompts, salts, strict=True))]


def letters(*prompts: str) -> list[Request]:
    return requests_of([[ord(letter) for letter in prompt] for prompt in prompts])


def saved(root: Prefix) -> int:
    return sum(prefix.saved for prefix in root.walk())


def check(root: Prefix, count: int) -> None:
    """Numbers are whole: edges follow one another, each prompt is in one place, and users are those below."""
    assert sorted(number for prefix in root.walk() for number in prefix.members) == list(range(count))
    for prefix in root.walk():
        below = [number for inner in prefix.walk() for number in inner.members]
        assert prefix.users == len(below)
        for child in prefix.children:
            assert child.parent is prefix and child.begin == prefix.end < child.end and child.users > 1


@pytest.mark.parametrize("seed", range(30))
def test_everything_that_is_shared_is_found(seed):
    rng = np.random.default_rng(seed)
    page_size = int(rng.integers(1, 4))
    base = rng.integers(0, 3, 30).tolist()
    prompts = [base[: rng.integers(0, 30)] + rng.integers(0, 3, rng.integers(1, 8)).tolist() for _ in range(40)]
    prompts += prompts[:5]
    salts = [str(salt) for salt in rng.integers(0, 2, len(prompts))]
    root = build(requests_of(prompts, salts), page_size)
    check(root, len(prompts))
    counts = collections.Counter(
        (salt, *prompt[:end])
        for prompt, salt in zip(prompts, salts, strict=True)
        for end in range(page_size, len(prompt), page_size)
    )
    assert saved(root) == page_size * sum(count - 1 for count in counts.values())
    for prefix in root.walk():
        shared = {tuple(prompts[n][: prefix.end]) for inner in prefix.walk() for n in inner.members}
        assert prefix.parent is None or len(shared) == 1
    least = int(rng.integers(1, 20))
    drop(root, least)
    check(root, len(prompts))
    assert all(prefix.saved >= least for prefix in root.walk() if prefix.parent)
    whole, parts = saved(root), sum(child.users * child.end for child in root.children)
    enlarge_first_level(root)
    check(root, len(prompts))
    assert saved(root) <= whole and all(not child.children for child in root.children) and parts >= 0


def test_prompts_within_prompts_and_duplicates():
    root = build(letters("abcd", "abcdefgh", "abcdefgh", "abcdefxx"), 2)
    (ab,) = root.children
    assert (ab.end, ab.users, ab.members) == (2, 4, [0]), "the last token of abcd is not shared"
    (abcdef,) = ab.children
    assert (abcdef.begin, abcdef.end, sorted(abcdef.members)) == (2, 6, [1, 2, 3])


def test_deep_trees_need_no_recursion():
    prompts = [[0] * i + [1] for i in range(1, 3000)]
    root = build(requests_of(prompts), 1)
    check_depth = sum(1 for _ in root.walk())
    assert check_depth > 2500
    enlarge_first_level(root)
    assert saved(root) > 0


def test_dropped_tokens_go_to_the_children():
    root = build(letters("aabbx1", "aabbx2", "aabbx3", "aacc", "aacd"), 1)
    drop(root, 8)
    (aa,) = root.children
    assert (aa.end, sorted(aa.members)) == (2, [0, 1, 2, 3, 4]) and aa.children == []
    root = build(letters("abbbbbb1", "abbbbbb2", "acccccc1", "acccccc2"), 1)
    drop(root, 4)
    assert [(child.begin, child.end) for child in root.children] == [(0, 7), (0, 7)]


def test_the_first_level_is_enlarged_where_that_saves_more_than_it_costs():
    # Below "aa" (2 tokens), "bbb" saves 3 for one more user, which pays; "c" saves 1, which does not.
    root = build(letters("aabbb1", "aabbb2", "aac1", "aac2", "aad"), 1)
    enlarge_first_level(root)
    groups = {(child.end, *sorted(child.members)) for child in root.children}
    assert groups == {(5, 0, 1), (2, 2, 3, 4)}
    assert saved(root) == 5 + 4


def test_a_single_child_takes_its_parents_place():
    # Both grandchildren leave; nothing is left of "aa" but one prompt, which then shares nothing.
    root = build(letters("aabbb1", "aabbb2", "aaccc1", "aaccc2", "aad"), 1)
    enlarge_first_level(root)
    assert {(child.end, *sorted(child.members)) for child in root.children} == {(5, 0, 1), (5, 2, 3)}
    assert root.members == [4]
    # One leaves, the other is all that is left, and takes what is above it.
    root = build(letters("aaabbbb1", "aaabbbb2", "aaac1", "aaac2"), 1)
    enlarge_first_level(root)
    assert {(child.end, *sorted(child.members)) for child in root.children} == {(7, 0, 1), (4, 2, 3)}


def test_enlargement_counts_prompts():
    # "bb" is shorter than the "aaa" before it, but three prompts share it.
    root = build(letters("aaabb1", "aaabb2", "aaabb3", "aaac", "aaad"), 1)
    enlarge_first_level(root)
    assert {(child.end, *sorted(child.members)) for child in root.children} == {(5, 0, 1, 2), (3, 3, 4)}
