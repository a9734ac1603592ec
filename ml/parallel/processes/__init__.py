"""Several processes as one run: how they meet, watch one another, agree when to stop, and name one that is lost."""

from ml.parallel.processes.agreement import Agreement
from ml.parallel.processes.health import Watch
from ml.parallel.processes.launch import Launch, find_launch, join
from ml.parallel.processes.roll import RESTART_STATUS, HealthConfig

__all__ = ["RESTART_STATUS", "Agreement", "HealthConfig", "Launch", "Watch", "find_launch", "join"]
