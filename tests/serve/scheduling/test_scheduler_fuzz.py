"""Thousands of random events; and proof that each of many small mistakes would have been seen."""

import array
import collections

import pytest
from fuzzing import Fuzzer, HalfRight
from model_device import reference

from ml.serve.scheduling.memory import CacheMemory
from ml.serve.scheduling.pages import PagePool
from ml.serve.scheduling.prefix_tree import Node, PrefixTree
from ml.serve.scheduling.request import Sequence, State
from ml.serve.scheduling.scheduler import Scheduler
from ml.serve.scheduling.speculation import Speculation
from ml.serve.scheduling.step import Row


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
    for seed in range(30):
        fuzzer = Fuzzer(seed)
        run = fuzzer.device.run

        def device_run(step, run=run):
            seen["copy"] += len(step.copies)
            seen["several decode steps"] += step.decode_steps > 1
            seen["token on the device"] += any(not row.tokens for row in step.rows)
            seen["mixed"] += len({row.fed > 1 for row in step.rows}) > 1
            seen["chunk"] += any(not row.samples for row in step.rows)
            seen["guesses beside a chunk"] += step.drafts > 0 and any(row.drafts < row.fed - 1 for row in step.rows)
            drawn = run(step)
            for row, tokens in zip(step.rows, drawn, strict=True):
                seen["first guess is wrong"] += row.drafts > 0 and not row.accepted(tokens)
                seen["some guesses are right"] += 0 < row.accepted(tokens) < row.drafts
                seen["all guesses are right"] += row.accepted(tokens) == row.drafts > 1
                seen["a guess ends it"] += not row.sequence.request.stop_ids.isdisjoint(tokens[: row.accepted(tokens)])
            return drawn

        fuzzer.device.run = device_run
        fuzzer.run(300)
        seen["preemption"] += fuzzer.scheduler.statistics.preemptions
        seen["cached"] += fuzzer.scheduler.statistics.cached
    assert len(seen) == 13 and min(seen.values()) > 5, seen


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


def _one_guess_too_many(row: Row, drawn) -> int:
    return min(row.drafts, _accepted(row, drawn) + 1)


def _count_all_guesses(speculation: Speculation, row: Row, new) -> None:
    _verify(speculation, row, new)
    row.sequence.computed += (row.sequence.state is State.RUNNING) * (row.drafts - row.accepted(new))


def _count_no_guess(speculation: Speculation, row: Row, new) -> None:
    computed = row.sequence.computed
    _verify(speculation, row, new)
    row.sequence.computed = computed


def _guess_ahead(speculation: Speculation, sequence: Sequence) -> bool:
    return speculation.on and sequence.request.speculate


def _publish_guesses(memory: CacheMemory, sequence: Sequence, limit: int | None = None) -> None:
    computed, tokens, keys = sequence.computed, sequence.tokens, len(sequence.page_keys(memory.page_size))
    if sequence.pending and not sequence.request.token_by_token:
        ahead = slice(len(tokens), len(sequence.table) * memory.page_size)
        sequence.tokens = tokens + array.array("i", reference(sequence.request, sequence.index)[0][ahead])
        sequence.computed = len(sequence.tokens)
    _publish(memory, sequence, limit)
    sequence.computed, sequence.tokens = computed, tokens
    del sequence._keys[keys:], sequence._chain[keys:]


def _wait_for_nothing(scheduler: Scheduler, sequence: Sequence, computing) -> bool:
    pending, sequence.pending = sequence.pending, 0
    waits = _must_wait(scheduler, sequence, computing)
    sequence.pending = pending
    return waits


def _wait_for_ever(scheduler: Scheduler, sequence: Sequence, computing) -> bool:
    return sequence.state is State.PREEMPTED or _must_wait(scheduler, sequence, computing)


_publish, _prepare, _close = CacheMemory.publish, CacheMemory.prepare, CacheMemory.close
_must_wait, _acquire = Scheduler._must_wait, PrefixTree.acquire
_accepted, _verify = Row.accepted, Speculation.verify
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
    "keeps a wrong guess": (Row, "accepted", _one_guess_too_many),
    "takes guesses for computed": (Speculation, "verify", _count_all_guesses),
    "computes guesses again": (Speculation, "verify", _count_no_guess),
    "guesses what a grammar must see": (Speculation, "includes", _guess_ahead),
    "publishes guesses": (CacheMemory, "publish", _publish_guesses),
    "never forgets a text": (HalfRight, "forget", lambda drafter, sequence: None),
    "no more decodes": (Scheduler, "_continue_decodes", lambda scheduler, draft: None),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_is_seen(name, monkeypatch):
    monkeypatch.setattr(*MUTANTS[name])
    with pytest.raises((AssertionError, RuntimeError, IndexError, KeyError)):
        for seed in range(60):
            Fuzzer(seed).run(150)
