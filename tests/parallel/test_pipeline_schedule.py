"""The pipeline's schedules: who computes what when, what is kept meanwhile, and how much time is lost."""

import itertools

import numpy as np
import pytest

from ml.errors import UserError
from ml.parallel.pipeline_schedule import Schedule, check_pipeline

KINDS = ("gpipe", "1f1b")
SIZES = [
    (p, m, v)
    for p, m, v in itertools.product((1, 2, 3, 4, 8), (1, 2, 3, 4, 8, 12, 24), (1, 2, 3))
    if v == 1 or m % p == 0
]
CASES = [Schedule(p, m, v, kind) for p, m, v in SIZES for kind in KINDS]


def runs(schedule, units):
    """``(virtual stage, microbatch) -> (tick, slot)`` of every unit."""
    found = {}
    for tick, stage in zip(*np.nonzero(units.active), strict=True):
        virtual = int(units.chunk[tick, stage]) * schedule.stages + int(stage)
        key = virtual, int(units.microbatch[tick, stage])
        assert key not in found, "a unit runs twice"
        found[key] = int(tick), int(units.slot[tick, stage])
    return found


@pytest.mark.parametrize("schedule", CASES, ids=str)
def test_every_unit_runs_once_after_what_it_needs_and_its_input_is_kept(schedule):
    p, m, v = schedule.stages, schedule.microbatches, schedule.chunks
    forward, backward = runs(schedule, schedule.forward), runs(schedule, schedule.backward)
    everything = set(itertools.product(range(p * v), range(m)))
    assert set(forward) == set(backward) == everything
    for virtual, microbatch in everything:
        tick, slot = forward[virtual, microbatch]
        back, same_slot = backward[virtual, microbatch]
        assert slot == same_slot < schedule.slots
        # What the neighbour sends arrives in the next tick and is not kept: it must be used there and then.
        if virtual:
            assert forward[virtual - 1, microbatch][0] == tick - 1
        if virtual < p * v - 1:
            assert backward[virtual + 1, microbatch][0] == back - 1
        else:
            assert back >= tick, "the loss lies between a tick's forward and its backward unit"
    # A slot holds one input at a time, from its forward to its backward tick.
    for stage in range(p):
        of_stage = [key for key in everything if key[0] % p == stage]
        for key in of_stage:
            begin, slot = forward[key]
            held = [k for k in of_stage if forward[k][1] == slot and forward[k][0] <= begin <= backward[k][0]]
            assert held == [key]


@pytest.mark.parametrize("schedule", CASES, ids=str)
def test_phases_cover_all_ticks_and_the_bubble_is_what_was_promised(schedule):
    p, m, v = schedule.stages, schedule.microbatches, schedule.chunks
    assert [phase.start for phase in schedule.phases] == [0, *(phase.stop for phase in schedule.phases[:-1])]
    for units, computes in ((schedule.forward, "forward"), (schedule.backward, "backward")):
        slots = 0
        for phase in schedule.phases:
            part = units.active[phase.start : phase.stop]
            slots += part.size if getattr(phase, computes) else 0
            assert getattr(phase, computes) or not part.any()
        assert slots == p * (m * v + p - 1)
        assert 1 - units.active.sum() / slots == pytest.approx((p - 1) / (m * v + p - 1))
    assert schedule.bubble == pytest.approx((p - 1) / (m * v + p - 1))


@pytest.mark.parametrize(("p", "v"), [(2, 1), (4, 1), (8, 1), (2, 2), (4, 2), (4, 4)])
def test_1f1b_keeps_as_many_inputs_as_there_are_stages_and_gpipe_all(p, v):
    few, many = Schedule(p, 4 * p, v), Schedule(p, 32 * p, v)
    assert few.slots == many.slots <= 2 * v * p - 1
    assert v == 1 or many.slots < 2 * v * p - 1, "sharing slots saves something where lives differ in length"
    assert few.head_slots == many.head_slots == 1
    assert Schedule(p, 32 * p, v, "gpipe").slots == 32 * p * v
    assert Schedule(p, 32 * p, v, "gpipe").head_slots == 32 * p


@pytest.mark.parametrize("schedule", CASES, ids=str)
def test_events_are_those_of_the_pipeline_s_two_ends(schedule):
    last = schedule.stages * schedule.chunks - 1
    forward, backward = runs(schedule, schedule.forward), runs(schedule, schedule.backward)
    expected = {
        "entering": (forward, 0),
        "leaving": (forward, last),
        "turning": (backward, last),
        "returning": (backward, 0),
    }
    live = {}
    for name, (units, virtual) in expected.items():
        events = getattr(schedule, name)
        ticks = {int(events.microbatch[t]): int(t) for t in np.flatnonzero(events.active)}
        assert ticks == {m: units[virtual, m][0] for m in range(schedule.microbatches)}
        live[name] = ticks, {int(events.microbatch[t]): int(events.slot[t]) for t in np.flatnonzero(events.active)}
    (begin, slot), (end, same_slot) = live["leaving"], live["turning"]
    assert slot == same_slot and max(slot.values()) < schedule.head_slots
    for a, b in itertools.combinations(range(schedule.microbatches), 2):
        assert slot[a] != slot[b] or end[a] < begin[b] or end[b] < begin[a]


@pytest.mark.parametrize(("p", "m", "v"), [(4, 1, 1), (4, 1, 2), (2, 3, 2), (4, 6, 2)])
def test_evaluation_runs_forward_only_with_any_number_of_microbatches(p, m, v):
    schedule = Schedule(p, m, v, None)
    forward = runs(schedule, schedule.forward)
    assert set(forward) == set(itertools.product(range(p * v), range(m)))
    assert all(k == 0 or forward[k - 1, i][0] == tick - 1 for (k, i), (tick, _) in forward.items())
    assert len(schedule.phases) == 1 and not schedule.backward.active.any()


def test_a_pipeline_that_does_not_divide_is_refused():
    check_pipeline(num_layers=8, stages=4, chunks=2, microbatches=8)
    check_pipeline(num_layers=8, stages=4, chunks=1, microbatches=3)
    with pytest.raises(
        UserError, match=r"num_layers=6 .*mesh\.stage=4 x .*pipeline_chunks=1; choose stage from 1, 2, 3, 6$"
    ):
        check_pipeline(num_layers=6, stages=4, chunks=1, microbatches=4)
    with pytest.raises(UserError, match=r"num_layers=8 .*stage=4 x .*chunks=4; choose stage from 1, 2$"):
        check_pipeline(num_layers=8, stages=4, chunks=4, microbatches=4)
    with pytest.raises(UserError, match=r"num_layers=8 .*chunks=3; lower pipeline_chunks$"):
        check_pipeline(num_layers=8, stages=4, chunks=3, microbatches=4)
    with pytest.raises(UserError, match=r"microbatches=6 .*stage=4.*chunks=2 needs; use 4 or 8, or pipeline_chunks=1$"):
        check_pipeline(num_layers=8, stages=4, chunks=2, microbatches=6)
