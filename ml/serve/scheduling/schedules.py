"""The schedules that a job can ask for by name."""

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

from ml.errors import UserError, nearest
from ml.serve.scheduling.planner import Planned, plan
from ml.serve.scheduling.policies import Fifo, LongestPrefix
from ml.serve.scheduling.request import Request

# Name: the policy for a job, of all its requests and the page size.
SCHEDULES: dict[str, Callable[[SequenceOf[Request], int], Fifo]] = {
    "fifo": lambda requests, page_size: Fifo(),
    "prefix": lambda requests, page_size: LongestPrefix(),
    "planned": lambda requests, page_size: Planned(requests, plan(requests, page_size)),
}


def make_policy(schedule: str, requests: SequenceOf[Request], page_size: int) -> Fifo:
    """The policy of a job by its name.

    Raises:
      UserError: there is none of this name.
    """
    if schedule not in SCHEDULES:
        raise UserError(f"schedule={schedule!r}: no such schedule; {nearest(schedule, SCHEDULES)}")
    return SCHEDULES[schedule](requests, page_size)
