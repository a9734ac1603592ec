"""How one process of a run joins the others: by hand, or as SLURM, MPI, GKE or a TPU pod started it."""

import contextlib
import dataclasses
import logging
import os
import socket
from collections.abc import Iterator
from typing import Literal

import jax

from ml.errors import UserError
from ml.parallel.processes.health import Watch, WatchedProcess
from ml.parallel.processes.meeting import gather, split_address
from ml.parallel.processes.relay import Relay
from ml.parallel.processes.roll import HealthConfig, Identity

# JAX's own watch ends a process without a name; it comes only where ours does not.
_JAX_PATIENCE = 4
_JAX_PATIENCE_SECONDS = 60


@dataclasses.dataclass(frozen=True)
class Launch:
    """One of several processes.

    Attributes:
      coordinator: ``HOST:PORT`` where process 0 listens.
      num_processes: how many there are.
      process_id: which one this is.
      local_device_ids: the only devices of this machine that this process may use; ``None``: all.
    """

    coordinator: str
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None = None


def find_launch(
    distributed: Literal["auto", "on", "off"],
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    seconds: float,
) -> Launch | None:
    """How this process was started: by its flags, or as the surroundings say.

    Args:
      distributed: ``off`` looks at the flags only; ``on`` refuses to be a single process.
      coordinator, num_processes, process_id: all or none.
      seconds: as of `detect_launch`.

    Returns:
      ``None``: a single process.

    Raises:
      UserError: only some of the flags were given, or what was found is not all that is needed.
    """
    by_hand = launch_by_hand(coordinator, num_processes, process_id)
    if by_hand is not None or num_processes is not None or distributed == "off":
        return by_hand
    found = detect_launch(seconds)
    if found is None and distributed == "on":
        raise UserError(
            "--distributed=on: neither SLURM, MPI, GKE nor a TPU pod was found; "
            "give --coordinator, --num_processes and --process_id"
        )
    return found


def launch_by_hand(coordinator: str | None, num_processes: int | None, process_id: int | None) -> Launch | None:
    """What the three flags say; ``None`` if they say nothing, or that there is one process.

    Raises:
      UserError: only some were given, or they do not fit one another.
    """
    flags = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
    missing = [name for name, value in flags.items() if value is None]
    if len(missing) == len(flags):
        return None
    if missing:
        given = " and ".join(f"{name}={value}" for name, value in flags.items() if value is not None)
        raise UserError(f"{given} without {' and '.join(missing)}; give all three, or none for a single process")
    assert coordinator is not None and num_processes is not None and process_id is not None
    split_address(coordinator)
    if num_processes < 1:
        raise UserError(f"--num_processes={num_processes} must be at least 1")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id={process_id} must lie in [0, {num_processes}), as --num_processes={num_processes}"
        )
    return Launch(coordinator, num_processes, process_id) if num_processes > 1 else None


def detect_launch(seconds: float) -> Launch | None:
    """What the surroundings say, as JAX reads them; ``None`` for a single process.

    Nothing is asked over the network unless this is a TPU machine.

    Args:
      seconds: how long to wait for the name of process 0's machine to be known.

    Raises:
      UserError: the surroundings are those of several processes, but do not say all that is needed.
    """
    from jax._src.clusters import ClusterEnv  # JAX has no public name for it

    if not _may_be_one_of_several():
        return None
    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, round(seconds))
    except Exception as error:  # whatever metadata servers, DNS and environment variables may do
        mend = "give --coordinator, --num_processes and --process_id, or --distributed=off for a single process"
        raise UserError(f"--distributed=auto: the other processes cannot be found ({error}); {mend}") from error
    coordinator, num_processes, process_id, local_device_ids = found
    if coordinator is None or num_processes is None or process_id is None or num_processes == 1:
        return None
    ids = None if local_device_ids is None else tuple(local_device_ids)
    return Launch(coordinator, num_processes, process_id, ids)


def _may_be_one_of_several() -> bool:
    """Whether it is worth to ask JAX, which may ask a metadata server."""
    from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm

    counts = [os.environ.get(name, "1") for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")]
    kubernetes = "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ
    return running_in_cloud_tpu_vm or kubernetes or any(count != "1" for count in counts)


@contextlib.contextmanager
def join(launch: Launch | None, config: HealthConfig) -> Iterator[Watch]:
    """Runs its body as one of the processes of ``launch``; JAX sees the devices of all of them.

    Must be entered before JAX's first computation. Errors that leave the body end the other processes too.

    Args:
      launch: ``None``: a single process, for which nothing is done.
      config: how long to wait for one another.

    Yields:
      Where to note what this process is about to do.

    Raises:
      UserError: the processes do not come together.
    """
    if launch is None:
        yield Watch()
        return
    me = Identity(launch.process_id, socket.gethostname(), os.getpid())
    meeting = gather(launch.coordinator, launch.num_processes, me, config.start_seconds)
    watch = WatchedProcess(meeting, me.process, config)
    with watch.failures():
        _initialize_jax(launch, meeting.service_port, config)
        yield watch
        watch.at("ending")
        jax.distributed.shutdown()
    watch.leave()


def _initialize_jax(launch: Launch, service_port: int, config: HealthConfig) -> None:
    host, _ = split_address(launch.coordinator)
    if launch.process_id:
        relay = Relay(host, service_port, config.start_seconds)
        address = relay.address
    else:
        address = f"127.0.0.1:{service_port}"
    logging.getLogger("jax._src.distributed").setLevel(logging.WARNING)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    jax.distributed.initialize(
        coordinator_address=address,
        num_processes=launch.num_processes,
        process_id=launch.process_id,
        local_device_ids=launch.local_device_ids,
        cluster_detection_method="deactivate",
        initialization_timeout=round(config.start_seconds),
        heartbeat_timeout_seconds=round(_JAX_PATIENCE * config.timeout_seconds + _JAX_PATIENCE_SECONDS),
        shutdown_timeout_seconds=round(config.slow_seconds),
    )
    if jax.default_backend() == "cpu":
        # A CPU program that comes from the cache has lost the order of its collective operations: they run at the same
        # time, and over gloo one gets the other's data ("Is there a distributed collective mismatch in your code?").
        jax.config.update("jax_enable_compilation_cache", False)
