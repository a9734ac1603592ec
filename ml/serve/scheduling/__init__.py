"""What runs next, on which pages: the host's half of the engine, without JAX."""

from ml.serve.scheduling.config import SchedulerConfig
from ml.serve.scheduling.forecast import forecast
from ml.serve.scheduling.ngrams import Drafter, NgramDrafter
from ml.serve.scheduling.planner import Plan, Planned, plan
from ml.serve.scheduling.policies import Fifo, LongestPrefix
from ml.serve.scheduling.request import FinishReason, Request, Sequence, State
from ml.serve.scheduling.scheduler import Scheduler
from ml.serve.scheduling.schedules import SCHEDULES, make_policy
from ml.serve.scheduling.statistics import Statistics
from ml.serve.scheduling.step import Row, Step, Update

__all__ = [
    "SCHEDULES",
    "Drafter",
    "Fifo",
    "FinishReason",
    "LongestPrefix",
    "NgramDrafter",
    "Plan",
    "Planned",
    "Request",
    "Row",
    "Scheduler",
    "SchedulerConfig",
    "Sequence",
    "State",
    "Statistics",
    "Step",
    "Update",
    "forecast",
    "make_policy",
    "plan",
]
