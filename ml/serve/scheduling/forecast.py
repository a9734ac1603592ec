"""What a job would cost under a schedule: the real scheduler, without a device."""

import collections
import dataclasses
import itertools
from collections.abc import Sequence as SequenceOf

from ml.serve.scheduling.config import SchedulerConfig
from ml.serve.scheduling.policies import Fifo
from ml.serve.scheduling.request import Request
from ml.serve.scheduling.scheduler import Scheduler
from ml.serve.scheduling.statistics import Statistics
from ml.serve.scheduling.step import Step


def forecast(requests: SequenceOf[Request], config: SchedulerConfig, policy: Fifo) -> Statistics:
    """Runs a job through the scheduler with made-up tokens; each sample draws as many as are expected.

    Args:
      requests: all of the job.
      config: of the scheduler.
      policy: a new one, which the forecast uses up.

    Raises:
      UserError: a request does not fit the cache.
    """
    scheduler = Scheduler(config, policy)
    for request in requests:
        scheduler.add(dataclasses.replace(request, max_tokens=request.likely_tokens, stop_ids=()))
    token = itertools.count(1 << 30)  # no two alike, so that completions share nothing
    flying: collections.deque[Step] = collections.deque()
    while scheduler.unfinished:
        step = scheduler.schedule()
        if step is not None:
            flying.append(step)
        if step is None or len(flying) > 1:
            done = flying.popleft()
            scheduler.on_sampled(done, [[next(token) for _ in range(row.samples)] for row in done.rows])
    return scheduler.statistics
