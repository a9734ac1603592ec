"""What goes into a step, in cases small enough to count by hand."""

import ast
import pathlib

import pytest
from model_device import ModelDevice, answer

import ml.serve.scheduling
from ml.errors import UserError
from ml.serve.scheduling import FinishReason, Request, Scheduler, SchedulerConfig, State


def make(**overrides) -> Scheduler:
    settings = {"pages": 64, "page_size": 4, "token_budget": 16, "max_running": 4, "watermark": 0.0}
    return Scheduler(SchedulerConfig(**(settings | overrides)))


def request(id: str, length: int, max_tokens: int = 4, **fields) -> Request:
    """Prompts of different requests differ from their first token on, if ``prompt`` does not say otherwise."""
    prompt = fields.pop("prompt", [ord(id[0]) % 50 + i for i in range(length)])
    return Request(id=id, prompt=prompt, max_tokens=max_tokens, **fields)


def shape(step) -> dict[str, tuple[int, int]]:
    """Tokens fed and drawn per sequence."""
    return {f"{row.sequence.request.id}#{row.sequence.index}": (row.fed, row.samples) for row in step.rows}


class Loop:
    """Steps with the results of each brought before the next is planned, or, if ``ahead``, after."""

    def __init__(self, scheduler: Scheduler, ahead: bool = False):
        self.scheduler, self.device = scheduler, ModelDevice(scheduler.config.page_size)
        self.ahead, self.flying = ahead, []

    def step(self):
        step = self.scheduler.schedule()
        if step is not None:
            self.flying.append((step, self.device.run(step)))
        while len(self.flying) > (self.ahead and step is not None):
            self.scheduler.on_sampled(*self.flying.pop(0))
        return step

    def finish(self):
        steps = []
        while self.scheduler.unfinished:
            steps.append(self.step())
        return [step for step in steps if step is not None]


def test_decodes_come_first_then_chunks_then_new_sequences():
    scheduler = make()
    loop = Loop(scheduler)
    scheduler.add(request("a", 3, max_tokens=8))
    assert shape(loop.step()) == {"a#0": (3, 1)}
    scheduler.add(request("b", 20))
    scheduler.add(request("c", 16))
    assert shape(loop.step()) == {"a#0": (1, 1), "b#0": (15, 0)}
    assert shape(loop.step()) == {"a#0": (1, 1), "b#0": (5, 1), "c#0": (10, 0)}
    assert shape(loop.step()) == {"a#0": (1, 1), "b#0": (1, 1), "c#0": (6, 1)}


def test_chunks_end_at_multiples():
    scheduler = make(chunk_multiple=8)
    loop = Loop(scheduler)
    scheduler.add(request("a", 2, max_tokens=9))
    loop.step()
    scheduler.add(request("b", 21))
    assert shape(loop.step()) == {"a#0": (1, 1), "b#0": (8, 0)}
    assert shape(loop.step()) == {"a#0": (1, 1), "b#0": (13, 1)}


@pytest.mark.parametrize("ahead", [False, True])
def test_every_sequence_yields_what_it_would_alone(ahead):
    scheduler = make(pages=12, decode_steps=4)
    requests = [request(id, 4 + i, max_tokens=9, n=1 + i % 2) for i, id in enumerate("abcde")]
    samples = [sample for r in requests for sample in scheduler.add(r)]
    Loop(scheduler, ahead).finish()
    for sample in samples:
        assert sample.output == answer(sample.request, sample.index)
        assert sample.finish_reason is FinishReason.LENGTH
    assert scheduler.memory.held == 0


def test_a_step_is_planned_before_the_results_of_the_last():
    scheduler = make()
    scheduler.add(request("a", 3, max_tokens=3))
    steps = [scheduler.schedule() for _ in range(4)]
    assert [step and shape(step) for step in steps] == [{"a#0": (3, 1)}, {"a#0": (1, 1)}, {"a#0": (1, 1)}, None]
    assert [len(step.rows[0].tokens) for step in steps[:3]] == [3, 0, 0]
    assert [step.rows[0].number for step in steps[:3]] == [0, 1, 2]
    with pytest.raises(RuntimeError, match="results of step 2 come before"):
        scheduler.on_sampled(steps[1], [[7]])


def test_a_stop_token_ends_a_sequence_that_is_under_way():
    scheduler = make()
    (sequence,) = scheduler.add(request("a", 3, max_tokens=9, stop_ids=[7]))
    first, second = scheduler.schedule(), scheduler.schedule()
    (update,) = scheduler.on_sampled(first, [[7]])
    assert update.tokens == (7,) and update.finish_reason is FinishReason.STOP
    assert scheduler.on_sampled(second, [[9]]) == [] and sequence.output == [7]
    assert scheduler.schedule() is None and not scheduler.unfinished and scheduler.memory.held == 0


def test_a_request_that_needs_its_tokens_is_not_planned_ahead():
    scheduler = make(decode_steps=4)
    scheduler.add(request("a", 3, token_by_token=True))
    first = scheduler.schedule()
    assert scheduler.schedule() is None
    scheduler.on_sampled(first, [[1]])
    second = scheduler.schedule()
    assert second.decode_steps == 1 and list(second.rows[0].tokens) == [1]


def test_several_decode_steps_reserve_their_pages():
    scheduler = make(decode_steps=8)
    loop = Loop(scheduler)
    scheduler.add(request("a", 3, max_tokens=12))
    scheduler.add(request("b", 3, max_tokens=4))
    loop.step()
    step = loop.step()
    assert step.decode_steps == 8 and shape(step) == {"a#0": (1, 8), "b#0": (1, 3)}
    assert [len(row.table) for row in step.rows] == [3, 2]  # 3 + 8 and 3 + 3 tokens
    step = loop.step()
    assert step.decode_steps == 4 and shape(step) == {"a#0": (1, 3)}, "no more steps than tokens are left"


def test_several_decode_steps_only_if_there_is_room():
    scheduler = make(decode_steps=8, pages=4, page_size=4)
    loop = Loop(scheduler)
    for id in "ab":
        scheduler.add(request(id, 3, max_tokens=10))
    loop.step()
    assert loop.step().decode_steps == 4, "two pages are left, one for each"
    loop.finish()


def test_samples_share_the_prompt_and_copy_its_last_page():
    scheduler = make()
    loop = Loop(scheduler)
    scheduler.add(request("a", 10, n=3))
    assert shape(loop.step()) == {"a#0": (10, 1)}
    step = loop.step()
    assert shape(step) == {"a#0": (1, 1), "a#1": (1, 1), "a#2": (1, 1)}
    tables = [row.table for row in step.rows]
    assert tables[0][:2] == tables[1][:2] == tables[2][:2] and len({table[2] for table in tables}) == 3
    assert sorted(step.copies) == sorted((tables[0][2], table[2]) for table in tables[1:])


def test_samples_whose_prompt_ends_with_a_page_compute_one_token():
    scheduler = make()
    loop = Loop(scheduler)
    scheduler.add(request("a", 9, n=2))  # its last token begins a page
    loop.step()
    step = loop.step()
    assert shape(step) == {"a#0": (1, 1), "a#1": (1, 1)} and not step.copies
    scheduler.add(request("b", 8, n=2))  # its last token ends one
    loop.step()
    step = loop.step()
    assert shape(step)["b#1"] == (1, 1) and len(step.copies) == 1
    loop.step()
    tables = [s.table for s in scheduler.running if s.request.id == "b"]
    assert tables[0][:2] == tables[1][:2], "the page was computed twice and is kept once"


@pytest.mark.parametrize("share", [False, True])
def test_a_prefix_under_way_is_computed_once(share):
    scheduler = make(share_in_flight=share, token_budget=64)
    loop = Loop(scheduler)
    for id in "abc":
        scheduler.add(request(id, 0, prompt=[*range(16), ord(id)]))
    first = loop.step()
    assert first.fed == (17 if share else 51)
    second = loop.step()
    assert second.fed == 3
    tables = [row.table for row in loop.step().rows]
    assert tables[0][:4] == tables[1][:4] == tables[2][:4], "pages computed twice are given up"
    assert scheduler.statistics.cached == (32 if share else 0)


def test_a_cached_prompt_still_computes_its_last_token():
    scheduler = make()
    loop = Loop(scheduler)
    for id, salt, reuse in (("a", "", True), ("b", "", True), ("c", "tenant", True), ("d", "", False)):
        scheduler.add(request(id, 0, prompt=list(range(8)), max_tokens=1, salt=salt, reuse_prefix=reuse))
    fed = {name: size for step in loop.finish() for name, (size, _) in shape(step).items()}
    assert fed == {"a#0": 8, "b#0": 4, "c#0": 8, "d#0": 8} and scheduler.statistics.cached == 4


def test_the_last_gives_its_pages_to_the_first():
    scheduler = make(pages=5)
    loop = Loop(scheduler)
    (a,), (b,) = scheduler.add(request("a", 7, max_tokens=8)), scheduler.add(request("b", 7, max_tokens=8))
    loop.step()
    loop.step()
    loop.step()
    assert b.state is State.PREEMPTED and a.state is State.RUNNING
    loop.finish()
    assert a.output == answer(a.request, 0) and b.output == answer(b.request, 0)
    assert scheduler.statistics.preemptions == 1


def test_priority_goes_before_arrival_and_that_before_order():
    scheduler = make(max_running=1)
    scheduler.add(request("a", 3, arrival=2.0))
    scheduler.add(request("b", 3, arrival=1.0))
    scheduler.add(request("c", 3, arrival=1.0))
    scheduler.add(request("d", 3, arrival=3.0, priority=-1))
    steps = Loop(scheduler).finish()
    assert list(dict.fromkeys(step.rows[0].sequence.request.id for step in steps)) == ["d", "b", "c", "a"]


def test_admission_leaves_the_watermark_and_nobody_overtakes():
    scheduler = make(pages=10, watermark=0.2)
    loop = Loop(scheduler)
    scheduler.add(request("a", 12))
    scheduler.add(request("b", 24))  # 6 pages of 7, but 2 have to stay free
    scheduler.add(request("c", 4))
    assert shape(loop.step()) == {"a#0": (12, 1)}
    assert shape(loop.step()) == {"a#0": (1, 1)}
    loop.finish()


def test_admission_by_what_is_expected():
    scheduler = make(pages=12, reserve="expected")
    loop = Loop(scheduler)
    for id in "abc":
        scheduler.add(request(id, 4, max_tokens=28, expected_tokens=17))  # 5 pages each
    assert set(shape(loop.step())) == {"a#0", "b#0"}
    assert set(shape(loop.step())) == {"a#0", "b#0"}


def test_cancelling_frees_pages_and_forgets_the_request():
    scheduler = make()
    a = scheduler.add(request("a", 10, n=2))
    step = scheduler.schedule()
    assert {update.finish_reason for update in scheduler.cancel("a")} == {FinishReason.CANCELLED}
    assert scheduler.memory.held == 0 and all(s.done for s in a) and not scheduler.unfinished
    assert scheduler.on_sampled(step, [[1]]) == [] and scheduler.cancel("a") == []
    scheduler.add(request("a", 10))


def test_a_lost_cache_is_computed_anew():
    scheduler = make()
    loop = Loop(scheduler)
    (a,) = scheduler.add(request("a", 10, max_tokens=6))
    loop.step()
    lost = scheduler.schedule()
    scheduler.reset()
    loop.device = ModelDevice(4)
    assert scheduler.on_sampled(lost, [[0]]) == []
    assert shape(loop.step()) == {"a#0": (11, 1)}
    loop.finish()
    assert a.output == answer(a.request, 0)


def test_what_cannot_run_is_refused_with_the_reason():
    scheduler = make(pages=4, max_length=100)
    scheduler.add(request("a", 13, max_tokens=4))  # the last token needs no room
    with pytest.raises(UserError, match=r"'b'.*exceed the cache of 16 tokens"):
        scheduler.add(request("b", 14, max_tokens=4))
    with pytest.raises(UserError, match=r"'b'.*exceed max_length=100"):
        scheduler.add(request("b", 97, max_tokens=4))
    with pytest.raises(UserError, match="id: is in use"):
        scheduler.add(request("a", 1))
    with pytest.raises(UserError, match="prompt: is empty"):
        request("a", 0, prompt=[])
    with pytest.raises(UserError, match="max_tokens=0"):
        request("a", 1, max_tokens=0)
    with pytest.raises(UserError, match="n=0"):
        request("a", 1, n=0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pages", 0),
        ("decode_steps", 3),
        ("watermark", 1.0),
        ("max_length", 1),
        ("reserve", "all"),
        ("token_budget", 2),
        ("speculate", -1),
        ("speculate", 16),
        ("speculate_ngram", 0),
        ("chunk_multiple", 14),
    ],
)
def test_settings_are_checked(field, value):
    with pytest.raises(UserError, match="token_budget" if field == "chunk_multiple" else field):
        make(**{field: value})


def test_scheduling_imports_no_jax():
    for path in pathlib.Path(ml.serve.scheduling.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                known = name.split(".")[0] not in ("jax", "flax", "pallas_kernels", "ml")
                assert known or name.startswith(("ml.serve.scheduling", "ml.errors")), f"{path} imports {name}"
