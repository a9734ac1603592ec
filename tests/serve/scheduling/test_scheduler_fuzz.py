"""Thousands of random events; and proof that each of many small mistakes would have been seen."""

import collections

import pytest
from fuzzing import Fuzzer

from ml.serve.scheduling.memory import CacheMemory
from ml.serve.scheduling.pages import PagePool
from ml.serve.scheduling.prefix_tree import Node, PrefixTree
from ml.serve.scheduling.request import Sequence, State
from ml.serve.scheduling.scheduler import Scheduler


@pytest.mark.parametrize("seed", range(100))
def test_random_events(seed):
    Fuzzer(seed).run(300)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 1600))
def test_many_more_random_events(seed):
    Fuzzer(seed).run(600)


def test_everything_happens(monkeypatch):
    """The events above are worth something only if all that is special comes to pass."""
    seen = collections.Counter()
    publish = PrefixTree.publish

    def counted(tree, node, keys, pages):
        node, kept = publish(tree, node, keys, pages)
        seen["page computed twice"] += kept != list(pages)
        return node, kept

    monkeypatch.setattr(PrefixTree, "publish", counted)
    for seed in range(20):
        fuzzer = Fuzzer(seed)
        run = fuzzer.device.run

        def device_run(step, run=run):
            seen["copy"] += len(step.copies)
            seen["several decode steps"] += step.decode_steps > 1
            seen["token on the device"] += any(not row.tokens for row in step.rows)
            seen["mixed"] += len({row.fed > 1 for row in step.rows}) > 1
            seen["chunk"] += any(not row.samples for row in step.rows)
            return run(step)

        fuzzer.device.run = device_run
        fuzzer.run(300)
        seen["preemption"] += fuzzer.scheduler.statistics.preemptions
        seen["cached"] += fuzzer.scheduler.statistics.cached
    assert len(seen) == 8 and min(seen.values()) > 20, seen


def _lock_the_node_alone(tree: PrefixTree, node: Node) -> None:
    if not node.locks:
        tree.evictable -= len(node.pages)
    node.locks += 1
    node.last_use = next(tree._clock)


def _publish_early(memory: CacheMemory, sequence: Sequence, limit: int | None = None) -> None:
    computed, sequence.computed = sequence.computed, len(sequence.tokens)
    _publish(memory, sequence, limit)
    sequence.computed = computed


def _publish_what_is_half_full(memory: CacheMemory, sequence: Sequence, limit: int | None = None) -> None:
    computed = sequence.computed
    sequence.computed = -(-computed // memory.page_size) * memory.page_size
    _publish(memory, sequence, limit)
    sequence.computed = computed


def _publish_without_exchange(memory: CacheMemory, sequence: Sequence, limit: int | None = None) -> None:
    table = sequence.table[:]
    _publish(memory, sequence, limit)
    sequence.table = table


def _copy_without_saying(memory: CacheMemory, sequence: Sequence, stop: int) -> list:
    _prepare(memory, sequence, stop)
    return []


def _forget_a_page(memory: CacheMemory, sequence: Sequence, keep: int | None = None) -> None:
    if len(sequence.table) > 2:
        sequence.table.pop()
    _close(memory, sequence, keep)


def _first_gives_way(scheduler: Scheduler, sequence: Sequence) -> bool:
    while scheduler.memory.missing(sequence, sequence.computed + 1) > scheduler.memory.available:
        victim = scheduler._running[0]
        scheduler._suspend(victim)
        if victim is sequence:
            return False
    return True


def _wait_for_nothing(scheduler: Scheduler, sequence: Sequence, computing) -> bool:
    pending, sequence.pending = sequence.pending, 0
    waits = _must_wait(scheduler, sequence, computing)
    sequence.pending = pending
    return waits


def _wait_for_ever(scheduler: Scheduler, sequence: Sequence, computing) -> bool:
    return sequence.state is State.PREEMPTED or _must_wait(scheduler, sequence, computing)


_publish, _prepare, _close = CacheMemory.publish, CacheMemory.prepare, CacheMemory.close
_must_wait, _acquire = Scheduler._must_wait, PrefixTree.acquire
MUTANTS = {
    "locks one node, not the path to it": (PrefixTree, "_lock", _lock_the_node_alone),
    "evicts what is locked": (Node, "evictable", property(lambda node: not node.children and node.parent is not None)),
    "tenants share": (PrefixTree, "acquire", lambda tree, salt, keys: _acquire(tree, "", keys)),
    "publishes before it is computed": (CacheMemory, "publish", _publish_early),
    "publishes before it is full": (CacheMemory, "publish", _publish_what_is_half_full),
    "keeps a page that was given up": (CacheMemory, "publish", _publish_without_exchange),
    "writes to shared pages": (PagePool, "shared", lambda pool, page: False),
    "does not hand out copies": (CacheMemory, "prepare", _copy_without_saying),
    "leaks a page": (CacheMemory, "close", _forget_a_page),
    "computes not even the last token": (CacheMemory, "_reusable", lambda m, s: len(s.tokens) // m.page_size),
    "the first is preempted": (Scheduler, "_make_room", _first_gives_way),
    "resumes without its last token": (Scheduler, "_must_wait", _wait_for_nothing),
    "what was preempted never resumes": (Scheduler, "_must_wait", _wait_for_ever),
    "chunks beyond the budget": (Scheduler, "_chunk", lambda scheduler, sequence, left: sequence.uncomputed),
    "no more decodes": (Scheduler, "_continue_decodes", lambda scheduler, draft: None),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_is_seen(name, monkeypatch):
    monkeypatch.setattr(*MUTANTS[name])
    with pytest.raises((AssertionError, RuntimeError, IndexError, KeyError)):
        for seed in range(60):
            Fuzzer(seed).run(150)
