"""The order of admission."""

import pytest
from model_device import ModelDevice

from ml.serve.scheduling import Fifo, LongestPrefix, Request, Scheduler, SchedulerConfig


def order_of_admission(policy, prompts) -> list[str]:
    """One sequence runs at a time; the first prompt has run when the others come."""
    scheduler = Scheduler(SchedulerConfig(pages=64, page_size=2, token_budget=64, max_running=1), policy)
    device, seen = ModelDevice(2), []
    for i, (id, prompt) in enumerate(prompts.items()):
        scheduler.add(Request(id=id, prompt=prompt, max_tokens=2))
        while scheduler.unfinished and i in (0, len(prompts) - 1):
            step = scheduler.schedule()
            seen += [row.sequence.request.id for row in step.rows]
            scheduler.on_sampled(step, device.run(step))
    return list(dict.fromkeys(seen))


PROMPTS = {
    "first": [1, 2, 3, 4, 5, 6, 7],
    "strange": [9, 9, 9, 9, 9, 9, 9],
    "near": [1, 2, 3, 4, 0, 0, 0],
    "nearer": [1, 2, 3, 4, 5, 6, 0],
}


@pytest.mark.parametrize(
    ("policy", "order"),
    [
        (Fifo(), ["first", "strange", "near", "nearer"]),
        (LongestPrefix(), ["first", "nearer", "near", "strange"]),
        (LongestPrefix(patience=3), ["first", "nearer", "near", "strange"]),
        (LongestPrefix(patience=1), ["first", "nearer", "strange", "near"]),
    ],
)
def test_order(policy, order):
    assert order_of_admission(policy, PROMPTS) == order
