"""Plans, by what they promise and by what the scheduler then does."""

import collections
import dataclasses
import itertools

import numpy as np
import pytest
from model_device import ModelDevice, answer

from ml.errors import UserError
from ml.serve.scheduling import (
    SCHEDULES,
    Planned,
    Request,
    Scheduler,
    SchedulerConfig,
    forecast,
    make_policy,
    plan,
)


def two_levels(seed: int = 0, documents: int = 6, sections: int = 4, questions: int = 5) -> list[Request]:
    """Documents of sections of questions, shuffled."""
    rng = np.random.default_rng(seed)
    requests = []
    for document in rng.integers(0, 1000, (documents, 40)).tolist():
        for section in rng.integers(0, 1000, (sections, 24)).tolist():
            for question in rng.integers(0, 1000, (questions, 9)).tolist():
                requests.append((document + section + question, int(rng.integers(2, 20))))
    order = rng.permutation(len(requests))
    return [Request(str(i), requests[j][0], 32, expected_tokens=requests[j][1]) for i, j in enumerate(order)]


CONFIG = SchedulerConfig(pages=4000, page_size=8, token_budget=128, max_running=32, reserve="expected")


def test_a_group_runs_together():
    requests = two_levels()
    planned = plan(requests, 8)
    for depth in (40, 64):
        runs = [tuple(requests[i].tokens[:depth]) for i in planned.order]
        changes = sum(a != b for a, b in itertools.pairwise(runs))
        assert changes == len(set(runs)) - 1


def test_long_decodes_go_first():
    prompts = {"long": (1, 40), "short": (2, 1), "middle": (3, 10)}
    requests = [
        Request(f"{name}{i}", [token] * 16 + [i] * 8, 64, expected_tokens=tokens + (i == 1))
        for i in range(3)
        for name, (token, tokens) in prompts.items()
    ]
    order = [requests[i].id for i in plan(requests, 8).order]
    names = ("long", "middle", "short")
    assert order == [f"{name}{i}" for name in names for i in (1, 0, 2)]


@pytest.mark.parametrize("levels", [None, 1])
def test_what_is_planned_is_what_is_computed(levels):
    requests = two_levels()
    planned = plan(requests, 8, levels=levels)
    counts = forecast(requests, CONFIG, Planned(requests, planned))
    if levels is None:
        assert counts.prefilled == planned.prompt - planned.saved
    else:  # groups that run one after the other share by chance what the plan does not count on
        assert counts.prefilled <= planned.prompt - planned.saved
    assert counts.preemptions == 0 and counts.decoded == sum(request.likely_tokens for request in requests)
    everything = 120 * 73 - (6 * 40 + 24 * 24 + 120 * 9)
    assert planned.saved == everything if levels is None else 0.5 * everything < planned.saved < everything


def test_a_plan_saves_most_where_memory_is_tight():
    requests = two_levels()
    config = SchedulerConfig(pages=60, page_size=8, token_budget=128, max_running=32, reserve="expected")
    counts = {name: forecast(requests, config, make_policy(name, requests, 8)) for name in SCHEDULES}
    assert counts["planned"].prefilled == plan(requests, 8).prompt - plan(requests, 8).saved
    assert counts["planned"].prefilled < 0.5 * counts["fifo"].prefilled
    assert counts["planned"].prefilled <= counts["prefix"].prefilled
    assert counts["planned"].steps < counts["fifo"].steps


def test_a_plan_needs_little_memory():
    requests = two_levels()
    peak = {name: forecast(requests, CONFIG, make_policy(name, requests, 8)).peak_pages for name in SCHEDULES}
    assert peak["planned"] < 0.85 * peak["fifo"]


def test_prefixes_are_freed_after_their_last_user():
    requests = two_levels()
    scheduler = Scheduler(CONFIG, Planned(requests, plan(requests, 8)))
    for request in requests:
        scheduler.add(request)
    device, most, left = ModelDevice(8), 0, collections.Counter(tuple(r.tokens[:40]) for r in requests)
    while scheduler.unfinished:
        step = scheduler.schedule()
        for update in scheduler.on_sampled(step, device.run(step)):
            if update.finish_reason:
                left[tuple(update.sequence.request.tokens[:40])] -= 1
                assert update.sequence.output == answer(update.sequence.request, 0)
        most = max(most, scheduler.memory.tree.size)
        cached = {tuple(r.tokens[:40]) for r in requests if scheduler.memory.tree.peek("", _keys(r))}
        assert all(left[document] for document in cached)
    assert scheduler.memory.pool.free == CONFIG.pages
    assert most < 6 * 5 + 24 * 3, "not all at once"


def _keys(request: Request) -> list[bytes]:
    return [request.tokens[i : i + 8].tobytes() for i in range(0, 72, 8)]


def test_samples_and_strangers_in_a_plan():
    requests = [Request(str(i), [1] * 20 + [i] * 5, 5, n=1 + 2 * (i % 2)) for i in range(6)]
    scheduler = Scheduler(CONFIG, Planned(requests, plan(requests, 8)))
    others = [Request(f"late{i}", [1] * 20 + [i + 50] * 5, 5) for i in range(3)]
    samples = [sample for request in [*others, *requests] for sample in scheduler.add(request)]
    assert [s.request.id for s in scheduler.waiting][-3:] == ["late0", "late1", "late2"]
    device = ModelDevice(8)
    while scheduler.unfinished:
        step = scheduler.schedule()
        scheduler.on_sampled(step, device.run(step))
    assert all(s.output == answer(s.request, s.index) for s in samples)


def test_a_prompt_is_kept_until_its_last_sample_has_ended():
    requests = [Request("a", list(range(33)), 1, n=4)]
    counts = forecast(requests, dataclasses.replace(CONFIG, max_running=1), Planned(requests, plan(requests, 8)))
    assert counts.prefilled == 33 + 3 and counts.cached == 3 * 32


def test_what_cannot_be_planned():
    with pytest.raises(UserError, match="id: is given twice"):
        plan([Request("a", [1], 1), Request("a", [2], 1)], 8)
    with pytest.raises(UserError, match="levels=2"):
        plan([], 8, levels=2)
    with pytest.raises(UserError, match=r"schedule='plan'.*did you mean 'planned'"):
        make_policy("plan", [], 8)
    assert plan([], 8).order == ()
