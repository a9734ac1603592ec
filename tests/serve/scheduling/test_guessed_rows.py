"""Guesses in a step, in cases small enough to count by hand."""

import array

import pytest
from model_device import answer, reference
from test_scheduler import Loop, make, request, shape

from ml.serve.scheduling import FinishReason, Scheduler, State


class Told:
    """Knows what the model device will draw; but that every ``wrong``-th token of a text is another."""

    def __init__(self, wrong=0):
        self.wrong, self.heard = wrong, []

    def propose(self, sequence, most):
        known = len(sequence.tokens)
        text = reference(sequence.request, sequence.index)[0][known : known + most]
        numbers = range(known - len(sequence.request.tokens) + 1, 10**6)
        wrong = (self.wrong and number % self.wrong == 0 for number in numbers)
        return array.array("i", [token + other for token, other in zip(text, wrong, strict=False)])

    def learn(self, sequence, drafted, accepted):
        self.heard.append((drafted, accepted))

    def forget(self, sequence):
        pass


def speculating(wrong=0, **changes) -> Scheduler:
    scheduler = make(**({"speculate": 3} | changes))
    return Scheduler(scheduler.config, drafter=Told(wrong))


def drafts(step) -> dict[str, int]:
    return {row.sequence.request.id: row.drafts for row in step.rows if row.drafts}


def test_right_guesses_are_several_tokens_in_one_step():
    scheduler = speculating()
    loop = Loop(scheduler)
    (a,) = scheduler.add(request("a", 3, max_tokens=10))
    assert shape(loop.step()) == {"a#0": (3, 1)}
    step = loop.step()
    assert (drafts(step), step.decode_steps, step.fed, step.drafts) == ({"a": 3}, 1, 4, 3)
    assert (len(a.output), a.computed, a.uncomputed, a.pending) == (5, 7, 1, 0)
    assert [drafts(step) for step in loop.finish()] == [{"a": 3}, {}]  # one token was left to draw
    assert a.output == answer(a.request, 0) and a.finish_reason is FinishReason.LENGTH
    counts = scheduler.statistics
    assert (counts.steps, counts.drafted, counts.accepted, counts.decoded, counts.prefilled) == (4, 6, 6, 10, 3)


def test_guesses_are_kept_up_to_the_first_wrong_one():
    scheduler = speculating(wrong=4)
    loop = Loop(scheduler)
    (a,) = scheduler.add(request("a", 3, max_tokens=14))
    loop.step()
    known = []
    while scheduler.unfinished:
        loop.step()
        known.append(len(a.output))
    assert a.output == answer(a.request, 0)
    assert known == [4, 8, 12, 14]
    assert scheduler._speculation.drafter.heard == [(3, 2), (3, 3), (3, 3), (1, 1)]
    counts = scheduler.statistics
    assert (counts.drafted, counts.accepted, counts.decoded) == (10, 9, 14)


def test_no_more_guesses_than_tokens_to_draw():
    for max_tokens in range(1, 9):
        scheduler = speculating(speculate=5)
        (a,) = scheduler.add(request("a", 3, max_tokens=max_tokens))
        steps = Loop(scheduler).finish()
        assert a.output == answer(a.request, 0)
        assert [step.drafts for step in steps] == [0, *([min(5, max_tokens - 2)] if max_tokens > 1 else []), 0, 0][
            : len(steps)
        ]


def test_a_stop_token_among_right_guesses_ends_the_text():
    drawn = answer(request("a", 3, max_tokens=9), 0)
    stop = drawn[2]
    scheduler = speculating(speculate=8)
    (a,) = scheduler.add(request("a", 3, max_tokens=9, stop_ids=[stop]))
    steps = Loop(scheduler).finish()
    assert a.output == drawn[: drawn.index(stop) + 1] and a.finish_reason is FinishReason.STOP
    assert len(steps) == 2 or a.output == [stop]
    assert scheduler.memory.held == 0


def test_guesses_get_what_prompts_leave_of_the_budget():
    scheduler = speculating()
    loop = Loop(scheduler)
    scheduler.add(request("a", 3, max_tokens=30))
    loop.step()
    scheduler.add(request("b", 16, max_tokens=30))
    step = loop.step()
    assert shape(step) == {"a#0": (1, 1), "b#0": (15, 0)} and not step.drafts
    scheduler.add(request("c", 12, max_tokens=30))
    step = loop.step()
    assert shape(step) == {"a#0": (3, 1), "b#0": (1, 1), "c#0": (12, 1)} and drafts(step) == {"a": 2}
    assert drafts(loop.step()) == {"a": 3, "b": 3, "c": 3}


def test_guesses_get_what_others_leave_of_the_pages():
    scheduler = speculating(pages=5, speculate=8)
    loop = Loop(scheduler)
    samples = [scheduler.add(request(id, 2, max_tokens=9))[0] for id in "ab"]
    loop.step()
    step = loop.step()
    # Of 3 free pages each of those that run may need one.
    assert drafts(step) == {"a": 5, "b": 1} and [len(row.table) for row in step.rows] == [2, 1]
    loop.finish()
    assert [s.output for s in samples] == [answer(s.request, 0) for s in samples]
    assert scheduler.statistics.preemptions == 0


def test_no_guesses_in_a_step_for_which_one_lost_its_pages():
    scheduler = speculating(pages=3, watermark=0)
    loop = Loop(scheduler)
    samples = [scheduler.add(request(id, 4, max_tokens=7, speculate=id == "a"))[0] for id in "ab"]
    loop.step()
    assert not loop.step().drafts and scheduler.statistics.preemptions == 1
    assert drafts(loop.step()) == {"a": 2}, "the rest of its page"
    loop.finish()
    assert [s.output for s in samples] == [answer(s.request, 0) for s in samples]


def test_what_is_guessed_is_not_found_by_others_before_it_is_known():
    scheduler = speculating()
    (a,) = scheduler.add(request("a", 3, max_tokens=12))
    loop = Loop(scheduler)
    loop.step()
    step = scheduler.schedule()
    assert drafts(step) == {"a": 3} and a.computed == 4 and len(a.table) == 2
    tokens = loop.device.run(step)
    assert scheduler.schedule() is None and scheduler.awaits  # publishes, too
    assert a.published == 1, "the prompt and the first token"
    scheduler.on_sampled(step, tokens)
    assert not scheduler.awaits and (a.computed, a.published) == (7, 1)


def test_a_sequence_that_lost_its_pages_keeps_what_was_right():
    scheduler = speculating()
    (a,) = scheduler.add(request("a", 3, max_tokens=12))
    loop = Loop(scheduler)
    loop.step()
    step = scheduler.schedule()
    tokens = loop.device.run(step)
    scheduler.schedule()  # publishes
    scheduler._suspend(a)
    assert scheduler.schedule() is None, "its last tokens are not known yet"
    scheduler.on_sampled(step, tokens)
    assert (len(a.output), a.computed, a.state) == (5, 0, State.PREEMPTED)
    assert shape(loop.step()) == {"a#0": (4, 1)}  # but for the page that was published
    loop.finish()
    assert a.output == answer(a.request, 0)


@pytest.mark.parametrize("fields", [{"speculate": False}, {"token_by_token": True}])
def test_who_does_not_speculate(fields):
    scheduler = speculating(decode_steps=4)
    loop = Loop(scheduler)
    scheduler.add(request("a", 3, max_tokens=20, **fields))
    loop.step()
    step = loop.step()
    assert not step.drafts and step.decode_steps == (1 if "token_by_token" in fields else 4)
    scheduler.add(request("b", 3, max_tokens=20))
    loop.step()
    step = loop.step()
    assert drafts(step) == {"b": 3} and shape(step)["a#0"] == (1, 1)


def test_without_guesses_it_is_stepwise_too():
    scheduler = make(speculate=3, decode_steps=4)  # n-grams, of a text without any
    scheduler.add(request("a", 3, max_tokens=20))
    loop = Loop(scheduler)
    assert [(step.decode_steps, step.drafts) for step in (loop.step(), loop.step())] == [(1, 0), (1, 0)]
