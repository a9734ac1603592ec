"""Replicas behind one front: every text is what one engine writes, and all of them have work at the same time."""

import dataclasses

import pytest
from engine_cases import SMALL, assert_exact, engine, greedy_requests, prompts, slow_greedy, weights

from ml.errors import UserError
from ml.serve.engine import Engine
from ml.serve.placement import serving_mesh
from ml.serve.replicated import ReplicatedEngine, make_engine
from ml.serve.sampling import SamplingParams

GREEDY = SamplingParams(max_tokens=12, temperature=0.0)
GROUPS = [tuple(range(begin, begin + 9)) for begin in (3, 30)]

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def made():
    return make_engine(*weights(), dataclasses.replace(SMALL, max_running=2), mesh=serving_mesh(data=2))


@pytest.fixture
def two(made):
    made.reset()
    return made


def grouped(count):
    """Prompts that begin in one of two ways, in turn."""
    return [(*GROUPS[i % 2], 50 + i) for i in range(count)]


def finish(two):
    news = []
    while two.unfinished:
        news += two.step()
    return news


def test_texts_are_those_of_the_whole_forward_and_groups_stay_together(two):
    before = [dataclasses.replace(each.statistics) for each in two.engines]
    given = grouped(8)
    asked = [dataclasses.replace(each, n=1) for each in greedy_requests(8)]
    assert_exact("plain", given, asked, two.generate(given, asked))
    for old, each in zip(before, two.engines, strict=True):
        assert each.statistics.prompt - old.prompt == 4 * 10  # a whole group
        assert each.statistics.cached - old.cached == 3 * 8  # computed once
    assert two.statistics.prompt == sum(each.statistics.prompt for each in two.engines)
    assert two.load.held_pages == 0
    assert two.load.pages == 2 * two.engines[0].load.pages
    two.step()
    assert two._router.loads == [0, 0] and not two._samples


def test_requests_go_where_their_prefix_is(two):
    for i, prompt in enumerate(grouped(6)):
        two.add(prompt, GREEDY, f"{i}")
    homes = [two._router.where(f"{i}") for i in range(6)]
    assert homes[:2] in ([0, 1], [1, 0]) and homes == homes[:2] * 3
    finish(two)
    for i, prompt in enumerate(grouped(2)[::-1]):  # now it is in the trees only
        two.add(prompt, GREEDY, f"again {i}")
        assert two._router.where(f"again {i}") == homes[1 - i]
    finish(two)


def test_cancelling_one_leaves_the_others_alone(two):
    given = grouped(4)
    (gone,), *kept = (two.add(prompt, GREEDY, f"{i}") for i, prompt in enumerate(given))
    for _ in range(3):
        two.step()
    (update,) = two.cancel("0")
    assert update.sequence is gone and two.cancel("nobody") == []
    finish(two)
    assert [sample.output for (sample,) in kept] == [slow_greedy("plain", prompt, 12) for prompt in given[1:]]
    assert gone.finish_reason.value == "cancelled"
    assert two.load.held_pages == 0
    two.step()
    assert two._router.loads == [0, 0]


def test_a_name_is_of_one_request_at_a_time(two):
    two.add(GROUPS[0], GREEDY, "a")
    with pytest.raises(UserError, match=r"'a'.*in use"):
        two.add(GROUPS[1], GREEDY, "a")
    with pytest.raises(UserError, match=r"prompt 1: .*'a'.*in use"):
        two.add_all(grouped(2), [GREEDY] * 2, ["b", "a"])
    with pytest.raises(UserError, match=r"prompt 1: .*'b'.*in use"):
        two.add_all(grouped(2), [GREEDY] * 2, ["b", "b"])
    finish(two)
    ((sample,),) = two.add_all(grouped(1), [GREEDY], ["a"])
    finish(two)
    assert sample.output == slow_greedy("plain", grouped(1)[0], 12)


def test_of_a_job_that_is_refused_nothing_is_queued(two):
    asked = [GREEDY, GREEDY, dataclasses.replace(GREEDY, max_tokens=96)]
    with pytest.raises(UserError, match=r"prompt 2: .*max_length=96"):
        two.add_all(grouped(3), asked)
    assert finish(two) == []
    two.step()
    assert two._router.loads == [0, 0]


def test_all_replicas_have_work_before_one_is_waited_for(two, monkeypatch):
    order = []

    def noted(where, method, number):
        whole = getattr(where, method)

        def run(*arguments):
            order.append((method, number))
            return whole(*arguments)

        monkeypatch.setattr(where, method, run)

    for number, each in enumerate(two.engines):
        noted(each._runner, "run", number)
        noted(each._scheduler, "on_sampled", number)
    two.add_all(grouped(4), [GREEDY] * 4)
    two.step()
    two.step()
    assert order[:4] == [("run", 0), ("run", 1)] * 2
    assert {method for method, _ in order[4:]} == {"on_sampled"}
    finish(two)


def test_a_slow_replica_keeps_no_other_waiting(two, monkeypatch):
    given = grouped(4)
    samples = two.add_all(given, [GREEDY] * 4)
    slow = two.engines[two._router.where(samples[0][0].request.id)]
    monkeypatch.setattr(type(slow), "ready", property(lambda self: self is not slow))
    other = next(each for each in two.engines if each is not slow)
    while other.unfinished:
        two.step()
    assert len(slow._in_flight) == 2
    assert not any(sample[0].output for sample in samples[::2])
    finish(two)
    assert [sample.output for (sample,) in samples] == [slow_greedy("plain", prompt, 12) for prompt in given]


def test_without_a_data_axis_there_is_one_engine():
    config, params = weights()
    assert type(make_engine(config, params, SMALL)) is Engine
    with pytest.raises(ValueError, match="make_engine"):
        Engine(config, params, SMALL, mesh=serving_mesh(data=2))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["fifo", "planned"])
def test_replicas_of_several_devices(schedule):
    settings = dataclasses.replace(SMALL, share="always", schedule=schedule)
    four = make_engine(*weights(), settings, mesh=serving_mesh(data=4, tensor=2))
    assert isinstance(four, ReplicatedEngine)
    given, asked = prompts(24), greedy_requests(24, most_samples=2)
    for _ in range(2):
        assert_exact("plain", given, asked, four.generate(given, asked))
    assert all(each.statistics.steps for each in four.engines)
    sampled = [SamplingParams(max_tokens=9, seed=seed, logprobs=1, prompt_logprobs=1) for seed in range(6)]
    mine, theirs = four.generate(given[:6], sampled), engine().generate(given[:6], sampled)
    assert [c.tokens for (c,) in mine] == [c.tokens for (c,) in theirs]
    for (a,), (b,) in zip(mine, theirs, strict=True):
        assert [x and x.logprob for x in a.prompt_logprobs] == pytest.approx(
            [x and x.logprob for x in b.prompt_logprobs], abs=1e-4
        )


@pytest.mark.slow
def test_replicas_guess():
    two = make_engine(*weights(), dataclasses.replace(SMALL, speculate=3, max_running=2), mesh=serving_mesh(data=2))
    given, asked = prompts(12), greedy_requests(12)
    assert_exact("plain", given, asked, two.generate(given, asked))
    assert two.statistics.accepted > 0
