"""Continuous batching: who takes part in the next step, with which tokens, on which pages."""

import bisect
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

from ml.errors import UserError
from ml.serve.scheduling.config import SchedulerConfig
from ml.serve.scheduling.draft import Draft
from ml.serve.scheduling.memory import CacheMemory
from ml.serve.scheduling.ngrams import Drafter, NgramDrafter
from ml.serve.scheduling.policies import Fifo
from ml.serve.scheduling.request import FinishReason, Request, Sequence, State
from ml.serve.scheduling.speculation import Speculation
from ml.serve.scheduling.statistics import Statistics
from ml.serve.scheduling.step import Step, Update


class Scheduler:
    """Plans steps under a token budget, ahead of the device (Agrawal et al. 2024, Sarathi-Serve, algorithm 3).

    Each step takes first all that decode, then further chunks of prompts that have begun, then new sequences as far as
    budget and memory go. If one that runs needs a page and there is none, the one that ranks last gives up its pages
    and later computes anew what the prefix tree has lost meanwhile; so the first always gets on, and everything ends.

    `schedule` may be called again before the results of earlier steps are here: lengths are known without them. Results
    must come through `on_sampled` in the order of the steps. One thread at a time.

    Sequences that speculate wait for their results, and feed guesses beside their last token as far as budget and pages
    are left over. They are kept while they are what is drawn anyway: no text depends on them.
    """

    def __init__(self, config: SchedulerConfig, policy: Fifo | None = None, drafter: Drafter | None = None):
        """``drafter`` guesses, if the settings want guesses; ``None``: by n-grams."""
        self.config, self.policy = config, policy or Fifo()
        self.memory = CacheMemory(config.pages, config.page_size)
        self.statistics = Statistics()
        drafter = drafter or NgramDrafter(config.speculate, config.speculate_ngram)
        self._speculation = Speculation(config.speculate, drafter, self.memory, self.statistics)
        self._requests: dict[str, list[Sequence]] = {}
        self._waiting: list[Sequence] = []  # by rank
        self._running: list[Sequence] = []  # by rank
        self._slots = list(range(config.max_running - 1, -1, -1))
        self._added = 0
        self._expected_results: list[int] = []  # numbers of the steps whose results are not here
        self._watermark = int(config.watermark * config.pages)

    @property
    def waiting(self) -> SequenceOf[Sequence]:
        """Sequences without pages, by rank."""
        return self._waiting

    @property
    def running(self) -> SequenceOf[Sequence]:
        """Sequences with pages, by rank."""
        return self._running

    @property
    def unfinished(self) -> bool:
        """Whether anything is left to do."""
        return bool(self._waiting or self._running)

    @property
    def awaits(self) -> bool:
        """Whether a step that is planned before the next results come leaves out some that would speculate."""
        return self._speculation.on and any(s.pending and self._speculation.includes(s) for s in self._running)

    def use(self, policy: Fifo) -> None:
        """Goes on with another policy.

        Raises:
          RuntimeError: something is unfinished, whose rank is the old policy's.
        """
        if self.unfinished:
            raise RuntimeError("the policy can change only while nothing is unfinished")
        self.policy = policy

    def add(self, request: Request) -> list[Sequence]:
        """Queues a request; returns its samples.

        Raises:
          UserError: its id is in use, or it could not run even alone.
        """
        if request.id in self._requests:
            raise UserError(f"request {request.id!r}: id: is in use by a request that is not finished; choose another")
        length = len(request.tokens) + request.max_tokens
        if self.config.max_length is not None and length > self.config.max_length:
            raise UserError(
                f"request {request.id!r}: {len(request.tokens)} tokens of prompt and max_tokens={request.max_tokens} "
                f"exceed max_length={self.config.max_length}; shorten the prompt or lower max_tokens"
            )
        if self.memory.pool.pages_for(length - 1) > self.config.pages:  # the last token drawn is never fed
            raise UserError(
                f"request {request.id!r}: {len(request.tokens)} tokens of prompt and max_tokens={request.max_tokens} "
                f"exceed the cache of {self.config.pages * self.config.page_size} tokens; shorten the prompt, lower "
                "max_tokens, or give the cache more memory"
            )
        sequences: list[Sequence] = []
        for index in range(request.n):
            sequence = Sequence(request, index, sequences[0] if index else None)
            sequence.rank = self.policy.rank(sequence, self._added)
            sequences.append(sequence)
            self._queue(sequence)
        self._added += 1
        self._requests[request.id] = sequences
        return sequences

    def cancel(
        self, request_id: str, reason: FinishReason = FinishReason.CANCELLED, index: int | None = None
    ) -> list[Update]:
        """Ends a request, or one sample of it; the next step has its pages.

        An id that is not known (any more) is no error.
        """
        samples = [s for s in self._requests.get(request_id, ()) if not s.done and index in (None, s.index)]
        return [self.finish(s, reason) for s in samples]

    def finish(self, sequence: Sequence, reason: FinishReason) -> Update:
        """Ends a sequence for a reason that only the caller sees: a stop string, a failure."""
        if not sequence.done:
            self._end(sequence, reason)
        return Update(sequence, (), sequence.finish_reason)

    def reset(self) -> None:
        """Starts anew after the device has lost the cache: all that ran wait again, with the tokens that are known.

        Results of steps that were handed out before are no longer taken.
        """
        for sequence in self._running[:]:
            self._suspend(sequence)
        self.memory.tree.clear()
        self._expected_results.clear()
        for sequence in self._waiting:
            sequence.pending = 0

    def schedule(self) -> Step | None:
        """Plans the next step; ``None``: there is nothing to do before results or requests come."""
        # By now what earlier steps compute is the past for any new step.
        for sequence in self._running:
            self.memory.publish(sequence, self.policy.publishable(sequence))
        draft = Draft(self.config.token_budget)
        preempted = self.statistics.preemptions
        self._continue_decodes(draft)
        self._continue_prompts(draft)
        if self.statistics.preemptions == preempted:
            self._admit(draft)
            # A page for each that runs, or the next step might take from one what another guessed for.
            self._speculation.add_guesses(draft, self._watermark + len(self._running))
        return self._hand_out(draft)

    def on_sampled(self, step: Step, tokens: SequenceOf[SequenceOf[int]]) -> list[Update]:
        """Takes the results of a step.

        Args:
          step: the earliest without results.
          tokens: per row of the step, what was drawn; what exceeds the row's ``draws`` is ignored.

        Returns:
          What is new, per sequence. A sequence that has ended since the step was planned is passed over.
        """
        if step.number not in self._expected_results:
            return []  # of before a reset
        if step.number != self._expected_results.pop(0):
            raise RuntimeError(f"the results of step {step.number} come before those of an earlier one")
        updates = []
        for row, drawn in zip(step.rows, tokens, strict=True):
            sequence = row.sequence
            if sequence.done or not row.samples:
                continue
            sequence.pending -= row.samples
            new = tuple(map(int, drawn[: row.samples + row.accepted(drawn)]))
            stop = next((i for i, token in enumerate(new) if token in sequence.request.stop_ids), None)
            new = new if stop is None else new[: stop + 1]
            sequence.tokens.extend(new)
            if row.drafts:
                self._speculation.verify(row, new)
            if stop is not None:
                self._end(sequence, FinishReason.STOP)
            elif not sequence.remaining and not sequence.pending:
                self._end(sequence, FinishReason.LENGTH)
            updates.append(Update(sequence, new, sequence.finish_reason))
        return updates

    def _continue_decodes(self, draft: Draft) -> None:
        for sequence in self._running[:]:
            if sequence.state is not State.RUNNING or sequence.uncomputed != 1 or not sequence.remaining:
                continue
            if sequence.pending and self._sees_each_token(sequence):
                continue
            stop = sequence.computed + 1
            if not self.memory.missing(sequence, stop):  # nearly always
                draft.add(sequence, 1, [])
            elif self._make_room(sequence):
                draft.add(sequence, 1, self.memory.prepare(sequence, stop))

    def _continue_prompts(self, draft: Draft) -> None:
        for sequence in self._running[:]:
            if sequence.state is not State.RUNNING or sequence.uncomputed <= 1:
                continue
            chunk = self._chunk(sequence, draft.left)
            if chunk:
                draft.add(sequence, chunk, [])  # it has had pages for the whole prompt since it was admitted

    def _admit(self, draft: Draft) -> None:
        if not self._waiting or not self._slots or not draft.left:
            return
        computing = {self._computing(s) for s in self._running if s.uncomputed > 1}
        growth = sum(map(self._growth, self._running)) if self.config.reserve == "expected" else 0
        for sequence in list(self.policy.order(self._waiting, self.memory.cached, self.statistics.steps)):
            if not draft.left or not self._slots:
                break
            if self._must_wait(sequence, computing):
                continue
            self.memory.open(sequence)
            length, found = len(sequence.tokens), sequence.computed
            chunk = self._chunk(sequence, draft.left)
            spare = self.memory.available - self.memory.missing(sequence, length)
            if self._running:
                spare -= self._watermark + growth
                if self.config.reserve == "expected":
                    spare -= self._growth(sequence)
            if not chunk or spare < 0:
                # Those behind do not overtake it, or one that needs much room would never find it.
                self.memory.close(sequence)
                break
            if sequence.state is State.WAITING:
                self.statistics.prompt += len(sequence.request.tokens)
                self.statistics.cached += found
                sequence.cached = found
            copies = self.memory.prepare(sequence, length)
            self._start(sequence)
            growth += self._growth(sequence) if self.config.reserve == "expected" else 0
            computing.add(self._computing(sequence))
            draft.add(sequence, chunk, copies)

    def _sees_each_token(self, sequence: Sequence) -> bool:
        """Whether each token must be known here before the next one is drawn."""
        return sequence.request.token_by_token or self._speculation.includes(sequence)

    def _hand_out(self, draft: Draft) -> Step | None:
        if not draft.chunks:
            return None
        decode_steps = 1
        if all(s.uncomputed == 1 and not self._sees_each_token(s) for s in draft.chunks):
            decode_steps = self._look_ahead(draft)
        counts = self.statistics
        counts.steps += 1
        step = draft.step(counts.steps, decode_steps)
        for row in step.rows:
            sequence = row.sequence
            if sequence.uncomputed > 1 or not sequence.drawn:
                counts.prefilled += row.fed - row.drafts
            counts.decoded += row.samples
            counts.drafted += row.drafts
            # Guesses are not its tokens yet.
            sequence.computed += row.fed - row.drafts + max(0, row.samples - 1)
            sequence.pending += row.samples
        counts.peak_pages = max(counts.peak_pages, self.memory.held)
        self._expected_results.append(step.number)
        return step

    def _look_ahead(self, draft: Draft) -> int:
        """Decode steps for which there is room without taking pages from anyone; reserves it."""
        steps = self.config.decode_steps
        longest = max(s.remaining for s in draft.chunks)
        while steps > 1 and steps >= 2 * longest:
            steps //= 2
        while steps > 1:
            stops = {s: s.computed + min(steps, s.remaining) for s in draft.chunks}
            if sum(self.memory.missing(s, stop) for s, stop in stops.items()) <= self.memory.available:
                for sequence, stop in stops.items():
                    draft.copies[sequence] += self.memory.prepare(sequence, stop)
                break
            steps //= 2
        return steps

    def _must_wait(self, sequence: Sequence, computing: Iterable[int | None]) -> bool:
        if sequence.pending:
            return True  # its last token is not known yet
        first = sequence.parent
        if first is not None and not first.done and not first.drawn:
            return True  # the first sample computes the prompt for all
        if not self.config.share_in_flight:
            return False
        page = self.memory.next_page(sequence)
        return page is not None and page in computing

    def _computing(self, sequence: Sequence) -> int | None:
        return self.memory.computing(sequence, self.policy.publishable(sequence))

    def _chunk(self, sequence: Sequence, left: int) -> int:
        if sequence.uncomputed <= left:
            return sequence.uncomputed
        stop = sequence.computed + left
        return max(0, stop - stop % self.config.chunk_multiple - sequence.computed)

    def _growth(self, sequence: Sequence) -> int:
        """Pages that a sequence is expected to need beyond its prompt, or beyond those it has."""
        length = len(sequence.request.tokens) + max(sequence.request.likely_tokens, sequence.drawn) - 1
        known = max(len(sequence.table), self.memory.pool.pages_for(len(sequence.tokens)))
        return max(0, self.memory.pool.pages_for(length) - known)

    def _make_room(self, sequence: Sequence) -> bool:
        """Takes pages from those that rank last, until the sequence can go on or is itself the last."""
        while self.memory.missing(sequence, sequence.computed + 1) > self.memory.available:
            victim = self._running[-1]  # not in the step yet: those that decode come by rank
            self._suspend(victim)
            self.statistics.preemptions += 1
            if victim is sequence:
                return False
        return True

    def _queue(self, sequence: Sequence) -> None:
        sequence.waiting_since = self.statistics.steps
        bisect.insort(self._waiting, sequence, key=_rank)

    def _start(self, sequence: Sequence) -> None:
        _remove(self._waiting, sequence)
        bisect.insort(self._running, sequence, key=_rank)
        sequence.state, sequence.slot = State.RUNNING, self._slots.pop()

    def _suspend(self, sequence: Sequence) -> None:
        self._stop(sequence, None)
        sequence.state = State.PREEMPTED
        self._queue(sequence)

    def _stop(self, sequence: Sequence, keep: int | None) -> None:
        _remove(self._running, sequence)
        self._speculation.drafter.forget(sequence)
        self._slots.append(sequence.slot)
        sequence.slot = -1
        self.memory.close(sequence, keep)

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        keep = self.policy.end(sequence)
        if sequence.state is State.RUNNING:
            self.memory.publish(sequence, self.policy.publishable(sequence))
            self._stop(sequence, keep)
        else:
            _remove(self._waiting, sequence)
        sequence.state, sequence.finish_reason = State.FINISHED, reason
        if all(s.done for s in self._requests[sequence.request.id]):
            del self._requests[sequence.request.id]


def _rank(sequence: Sequence) -> tuple:
    return sequence.rank


def _remove(ordered: list[Sequence], sequence: Sequence) -> None:
    del ordered[bisect.bisect_left(ordered, sequence.rank, key=_rank)]
