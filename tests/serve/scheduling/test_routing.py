"""Requests with the same beginning go to the same replica, and all replicas have work."""

import itertools

import numpy as np
import pytest

from ml.serve.scheduling.request import Request
from ml.serve.scheduling.routing import Router, deal

PAGE = 4


def request(name, prompt, max_tokens=4, **more):
    return Request(str(name), prompt, max_tokens, **more)


def routed(router, request, cached=None):
    replica = router.choose(request, cached or [0] * len(router.loads))
    router.note(request, replica)
    return replica


def groups(sizes, length=16, own=3, seed=0, n=1):
    """Requests of groups that share ``length`` tokens, shuffled; beside them, the group of each."""
    rng = np.random.default_rng(seed)
    prefixes = [rng.integers(0, 1000, length).tolist() for _ in sizes]
    members = [group for group, size in enumerate(sizes) for _ in range(size)]
    rng.shuffle(members)
    given = [request(i, prefixes[g] + rng.integers(0, 1000, own).tolist(), n=n) for i, g in enumerate(members)]
    return given, members


def test_the_replica_that_holds_most_of_a_prompt_gets_it():
    router = Router(3, PAGE, slack=1000)
    assert router.choose(request("a", range(20)), [0, 8, 4]) == 1
    assert router.choose(request("a", range(20)), [4, 0, 16]) == 2


def test_what_unfinished_requests_will_compute_counts_as_held():
    router = Router(2, PAGE, slack=1000)
    prefix = list(range(12))
    home = routed(router, request("a", [*prefix, 50]))
    other = routed(router, request("b", [7] * 13))
    assert other == 1 - home
    assert routed(router, request("c", [*prefix, 51, 52])) == home
    assert routed(router, request("d", [*prefix, 53], salt="another")) == other  # shares nothing, and fewer wait there
    for name in "ac":
        router.ended(name)
    assert routed(router, request("e", [*prefix, 54])) == home  # it is idle now; the tree would say so too
    router.ended("e")
    assert router.loads[home] == 0 and not router._pages[home]


def test_a_prompt_that_nobody_holds_goes_to_the_idlest():
    router = Router(3, PAGE, slack=1000)
    assert {routed(router, request(i, [i] * 9)) for i in range(3)} == {0, 1, 2}
    assert routed(router, request("long", [8] * 200)) == 0
    assert [routed(router, request(f"more {i}", [20 + i] * 9)) for i in range(4)] == [1, 2, 1, 2]


def test_one_that_is_much_more_loaded_is_passed_over():
    router = Router(2, PAGE, slack=100)
    went = [routed(router, request(i, [*range(12), 100 + i])) for i in range(100)]
    assert went[:6] == [0] * 6  # of 17 tokens each
    assert went[6] == 1
    assert 40 < went.count(0) < 60  # both hold the prefix from then on


def test_a_request_is_where_it_went():
    router = Router(2, PAGE, slack=0)
    assert router.where("a") is None
    replica = routed(router, request("a", range(9)))
    assert router.where("a") == replica
    router.ended("a")
    assert router.where("a") is None
    assert router.loads == [0, 0]


def test_whole_groups_are_dealt_evenly():
    given, members = groups([6] * 4 + [3] * 4)
    dealt = deal(given, PAGE, [0, 0])
    assert sorted(itertools.chain(*dealt)) == list(range(len(given)))
    of = [{members[i] for i in part} for part in dealt]
    assert not of[0] & of[1]
    assert [len(part) for part in dealt] == [18, 18]
    assert all(part == sorted(part) for part in dealt)


def test_a_group_that_is_too_large_is_dealt_in_parts():
    given, _ = groups([40])
    assert [len(part) for part in deal(given, PAGE, [0] * 4)] == [10] * 4


def test_a_group_whose_prefix_is_most_of_it_stays_whole():
    given, _ = groups([8], length=1000, own=5)
    given += [request(f"own {i}", [5000 + i] * 50) for i in range(12)]
    assert sorted(map(len, deal(given, PAGE, [0, 0]))) == [8, 12]
    given, _ = groups([8], length=1000, own=100)
    assert [len(part) for part in deal(given, PAGE, [0, 0])] == [4, 4]  # else one would have nothing to do


def test_a_prefix_counts_wherever_a_part_goes():
    """Of a group that is cut and the short prompts beside it: the replica without the group gets most of those."""
    given, _ = groups([20], length=100, own=26)
    given += [request(f"own {i}", [5000 + i] * 10) for i in range(24)]
    *both, other = deal(given, PAGE, [0, 0, 290])
    assert [sum(i < 20 for i in part) for part in both] == [10, 10]
    assert len(other) in (13, 14)


def test_a_split_group_stays_whole_below():
    """A prefix of all, under which are four groups: each goes to one replica."""
    rng = np.random.default_rng(1)
    first = rng.integers(0, 1000, 8).tolist()
    second = [rng.integers(0, 1000, 8).tolist() for _ in range(4)]
    given = [request(i, first + second[i % 4] + rng.integers(0, 1000, 3).tolist()) for i in range(32)]
    dealt = deal(given, PAGE, [0, 0])
    assert [sorted({i % 4 for i in part}) for part in dealt] in ([[0, 1], [2, 3]], [[0, 2], [1, 3]], [[0, 3], [1, 2]])


def test_replicas_that_have_work_get_less():
    given, _ = groups([2] * 20)
    each = 16 + 2 * (3 + 4)
    assert [len(part) for part in deal(given, PAGE, [0, 10 * each])] == [30, 10]


@pytest.mark.parametrize("seed", range(20))
def test_any_job_is_dealt_whole_and_evenly(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 12, rng.integers(1, 9)).tolist()
    given, _ = groups(sizes, own=int(rng.integers(1, 6)), seed=seed, n=int(rng.integers(1, 3)))
    replicas = int(rng.integers(2, 5))
    dealt = deal(given, PAGE, [0] * replicas)
    assert sorted(itertools.chain(*dealt)) == list(range(len(given)))
    loads = [sum(len(given[i].tokens) + 4 * given[i].n for i in part) for part in dealt]
    largest = max(len(each.tokens) + 4 * each.n for each in given)
    assert max(loads) <= 1.6 * sum(loads) / replicas + largest


def test_nothing_is_dealt_to_nobody():
    assert deal([], PAGE, [0, 0]) == [[], []]
