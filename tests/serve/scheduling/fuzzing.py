"""Drives a scheduler with random events against the model device, and recounts everything after each."""

import array
import collections

import numpy as np
from model_device import VOCABULARY, ModelDevice, answer, reference

from ml.errors import UserError
from ml.serve.scheduling.config import SchedulerConfig
from ml.serve.scheduling.planner import Planned, plan
from ml.serve.scheduling.policies import Fifo, LongestPrefix
from ml.serve.scheduling.request import FinishReason, Request, Sequence, State
from ml.serve.scheduling.scheduler import Scheduler
from ml.serve.scheduling.step import Step


def random_config(rng: np.random.Generator) -> SchedulerConfig:
    """Small and tight."""
    max_running, chunk_multiple = int(rng.integers(1, 7)), int(rng.choice([1, 1, 3]))
    token_budget = max_running - 1 + chunk_multiple + int(rng.integers(0, 24))
    return SchedulerConfig(
        pages=int(rng.integers(6, 40)),
        page_size=int(rng.integers(1, 7)),
        token_budget=token_budget,
        max_running=max_running,
        decode_steps=int(rng.choice([1, 2, 4])),
        watermark=float(rng.choice([0, 0.2])),
        chunk_multiple=chunk_multiple,
        share_in_flight=bool(rng.integers(2)),
        reserve="expected" if rng.integers(3) == 0 else "prompt",
        speculate=min(int(rng.choice([0, 1, 3, 6])), token_budget - 1),
        speculate_ngram=int(rng.integers(1, 4)),
    )


class HalfRight:
    """Knows how texts go on, and says so up to a random place."""

    def __init__(self, rng: np.random.Generator):
        self.rng, self.running = rng, set()

    def propose(self, sequence: Sequence, most: int) -> "array.array[int]":
        self.running.add(sequence)
        known = len(sequence.tokens)
        tokens = reference(sequence.request, sequence.index)[0][known : known + most]
        for i in range(self.rng.integers(2 * most), len(tokens)):
            tokens[i] = int(self.rng.integers(VOCABULARY))
        del tokens[self.rng.integers(2 * most + 1) :]
        return array.array("i", tokens)

    def learn(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        assert sequence in self.running and 0 <= accepted <= drafted

    def forget(self, sequence: Sequence) -> None:
        self.running.discard(sequence)


class Fuzzer:
    """One scheduler, one device, and what is under way between them."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.config = random_config(self.rng)
        self.device = ModelDevice(self.config.page_size)
        self.flying: collections.deque[tuple[Step, list[list[int]]]] = collections.deque()
        self.bases = [self.rng.integers(0, VOCABULARY, 40).tolist() for _ in range(3)]
        self.known: dict[Sequence, list[int]] = {}
        self.requests = [self.request(i) for i in range(400)]
        self.drafter = HalfRight(self.rng) if self.rng.integers(4) else None
        self.scheduler = Scheduler(self.config, self.policy(planned=self.requests[:50]), self.drafter)
        self.requests.reverse()

    def run(self, events: int) -> None:
        """Random events, then until nothing is left."""
        for _ in range(events):
            event = self.rng.choice(
                [self.add, self.step, self.deliver, self.cancel, self.finish, self.reset],
                p=[0.15, 0.45, 0.35, 0.03, 0.015, 0.005],
            )
            event()
            self.check()
        self.drain()

    def drain(self) -> None:
        """Steps until all requests are done; a scheduler that idles or goes round in circles is found out."""
        most = 2000
        while self.scheduler.unfinished:
            before = len(self.flying)
            self.step()
            assert self.flying, "requests are left, nothing runs, and no results are awaited"
            if len(self.flying) == before or self.rng.integers(2):
                self.deliver()
            self.check()
            most -= 1
            assert most, f"no end: {self.scheduler.waiting} {self.scheduler.running}"
        while self.flying:
            self.deliver()
        self.check()
        memory = self.scheduler.memory
        assert memory.held == 0
        memory.tree.clear()
        assert memory.pool.free == self.config.pages, "pages leak"
        assert not self.scheduler._requests and len(self.scheduler._slots) == self.config.max_running
        assert all(sequence.done for sequence in self.known)
        assert self.drafter is None or not self.drafter.running

    def policy(self, planned: list[Request]) -> Fifo:
        """Any; a plan knows some of the requests, in its own order of them."""
        order = self.rng.permutation(len(planned))
        return [
            Fifo(),
            LongestPrefix(patience=20),
            Planned([planned[i] for i in order], plan([planned[i] for i in order], self.config.page_size)),
            Planned(planned, plan(planned, self.config.page_size, levels=1)),
        ][self.rng.integers(4)]

    def request(self, number: int) -> Request:
        """One that shares its beginning with others."""
        base = self.bases[self.rng.integers(3)]
        own = self.rng.integers(0, VOCABULARY, self.rng.integers(0, 6)).tolist()
        prompt = base[: self.rng.integers(0, 25)] + own or [0]
        return Request(
            id=str(number),
            prompt=prompt,
            max_tokens=int(self.rng.integers(1, 14)),
            n=int(self.rng.choice([1, 1, 3])),
            priority=int(self.rng.integers(2)),
            stop_ids=(0,) if self.rng.integers(4) == 0 else (),
            salt=str(self.rng.choice(["", "", "tenant"])),
            expected_tokens=int(self.rng.integers(0, 14)),
            reuse_prefix=bool(self.rng.integers(8)),
            token_by_token=self.rng.integers(8) == 0,
            speculate=self.rng.integers(4) > 0,
        )

    def add(self) -> None:
        """The next request."""
        if len(self.scheduler.waiting) > 12 or not self.requests:
            return
        request = self.requests.pop()
        size = len(request.tokens) + request.max_tokens - 1
        try:
            sequences = self.scheduler.add(request)
        except UserError:
            assert size > self.config.pages * self.config.page_size
            return
        assert size <= self.config.pages * self.config.page_size
        self.known |= {sequence: [] for sequence in sequences}

    def step(self) -> None:
        """Plans a step and runs it; its results stay under way."""
        if len(self.flying) == 3:
            return
        first, ready = self.scheduler.running[:1], [s for s in self.scheduler.running if self.can_decode(s)]
        pending = {s for s in self.scheduler.running if s.pending}
        assert self.scheduler.awaits == any(self.speculates(s) for s in pending)
        preemptions = self.scheduler.statistics.preemptions
        step = self.scheduler.schedule()
        self.check_tree()
        self.check_progress(ready, first, step)
        if step is not None:
            self.check_step(step)
            if step.drafts:
                self.check_guesses(step, pending)
                assert self.scheduler.statistics.preemptions == preemptions
            self.flying.append((step, self.device.run(step)))

    def deliver(self) -> None:
        """The results of the earliest step arrive."""
        if not self.flying:
            return
        step, tokens = self.flying.popleft()
        padded = [[*drawn, *[-1] * (step.decode_steps - len(drawn))] for drawn in tokens]
        for update in self.scheduler.on_sampled(step, padded):
            sequence, request = update.sequence, update.sequence.request
            self.known[sequence] += update.tokens
            expected = answer(request, sequence.index)
            assert self.known[sequence] == sequence.output == expected[: len(sequence.output)]
            if update.finish_reason is not None:
                assert sequence.output == expected and sequence.done
                stopped = expected[-1] in request.stop_ids
                assert update.finish_reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)

    def cancel(self) -> None:
        """Someone hangs up."""
        alive = [s for s in self.known if not s.done]
        if alive:
            request = alive[self.rng.integers(len(alive))].request
            self.scheduler.cancel(request.id)
            assert all(s.done and not s.table for s in self.known if s.request is request)

    def finish(self) -> None:
        """A stop string is found."""
        alive = [s for s in self.known if not s.done]
        if alive:
            self.scheduler.finish(alive[self.rng.integers(len(alive))], FinishReason.STOP)

    def reset(self) -> None:
        """The device loses its cache."""
        self.device = ModelDevice(self.config.page_size)
        late = list(self.flying)
        self.flying.clear()
        self.scheduler.reset()
        for step, tokens in late:
            assert self.scheduler.on_sampled(step, tokens) == []

    def can_decode(self, sequence: Sequence) -> bool:
        """Whether a running sequence has a next token to draw now."""
        waits = sequence.pending and (sequence.request.token_by_token or self.speculates(sequence))
        return bool(sequence.uncomputed == 1 and sequence.remaining and not waits)

    def speculates(self, sequence: Sequence) -> bool:
        """Whether its tokens may be guessed."""
        return bool(self.config.speculate and sequence.request.speculate and not sequence.request.token_by_token)

    def check_progress(self, ready: list[Sequence], first: list[Sequence], step: Step | None) -> None:
        """What decoded goes on decoding, unless it lost its pages; the first always gets on."""
        rows = {row.sequence for row in step.rows} if step else set()
        running = list(self.scheduler.running)
        for sequence in ready:
            assert sequence in rows or sequence.state is State.PREEMPTED, f"{sequence} stalls"
            assert sequence.state is not State.PREEMPTED or all(s.rank < sequence.rank for s in running), "wrong victim"
        if ready and ready[:1] == first:
            assert ready[0] in rows, f"{ready[0]}, the first of all, gives way"

    def check_step(self, step: Step) -> None:
        """Budgets, slots, and that nothing shared is written."""
        config, pool = self.config, self.scheduler.memory.pool
        assert 0 < step.fed <= config.token_budget and len(step.rows) <= config.max_running
        assert step.decode_steps <= config.decode_steps
        slots = [row.slot for row in step.rows]
        assert len(set(slots)) == len(slots) and all(0 <= slot < config.max_running for slot in slots)
        for row in step.rows:
            assert row.samples <= step.decode_steps and (step.decode_steps == 1 or row.fed == 1)
            stop = row.start + row.fed + max(0, row.samples - 1)
            assert len(row.table) * config.page_size >= stop and row.start < stop
            if not row.samples:
                assert stop % config.chunk_multiple == 0
            for page in row.table[row.start // config.page_size : -(-stop // config.page_size)]:
                assert pool.references[page] == 1, f"{row.sequence} writes page {page}, which is shared"

    def check_guesses(self, step: Step, pending: set[Sequence]) -> None:
        """Who guesses, how much, and that no one has to give way for it."""
        assert step.decode_steps == 1
        for row in step.rows:
            if row.drafts:
                assert self.speculates(row.sequence) and row.sequence not in pending
                assert row.samples == 1 and row.fed == row.drafts + 1
                assert row.drafts <= min(self.config.speculate, row.sequence.request.max_tokens - row.number - 1)
            elif not row.samples:
                assert self.config.chunk_multiple > 1, f"{row.sequence} could have fed more than {row.fed} tokens"

    def check_tree(self) -> None:
        """Every page of the tree holds what its place in the tree says."""
        for node in self.scheduler.memory.tree.nodes():
            above, keys = node.parent, list(node.keys)
            while above is not None:
                above, keys = above.parent, above.keys + keys
            tokens = array.array("i", b"".join(keys)).tolist()
            for i, page in enumerate(node.pages, node.start + 1):
                assert self.device.holds(page, tokens[: i * self.config.page_size], node.salt), "published too early"

    def check(self) -> None:
        """Counts all references anew; finds strangers that share a page."""
        memory, running = self.scheduler.memory, self.scheduler.running
        nodes = [node for node in memory.tree.nodes() if node.parent is not None]
        references = [0] * self.config.pages
        for pages in [*(node.pages for node in nodes), *(s.table for s in running)]:
            for page in pages:
                references[page] += 1
        assert references == memory.pool.references, "references are miscounted"
        unlocked = sum(len(node.pages) for node in nodes if not node.locks)
        only_tree = sum(memory.pool.references[page] == 1 for node in nodes for page in node.pages)
        held = {page for s in running for page in s.table}
        assert memory.tree.evictable == unlocked == only_tree and memory.tree.size == sum(len(n.pages) for n in nodes)
        assert memory.pool.free + memory.tree.evictable + len(held) == self.config.pages
        assert memory.held == len(held)
        owner: dict[int, tuple] = {}
        for s in running:
            assert s.state is State.RUNNING and s.computed <= len(s.tokens) + s.pending
            for i, page in enumerate(s.table):
                known = s.tokens[: (i + 1) * self.config.page_size].tobytes()
                assert owner.setdefault(page, (s.request.salt, i, known)) == (s.request.salt, i, known), "strangers"
        for ordered in (self.scheduler.waiting, running):
            assert [s.rank for s in ordered] == sorted(s.rank for s in ordered)
        assert all(not s.table and s.slot < 0 and s.node is None for s in self.scheduler.waiting)
