"""Trains a language model; run it again with the same flags to go on from the newest checkpoint."""

import signal
import sys

import app
import config_flag
from absl import flags

_USAGE = """
Trains a language model. The same command again goes on from the newest checkpoint.

  python scripts/train.py --config=configs/lm/quickstart.py --workdir=runs/first --config.train.steps=100

One process on each machine trains on the devices of all. SLURM, MPI, GKE and TPU pods are detected; by hand:

  python scripts/train.py ... --coordinator=HOST_OF_PROCESS_0:8476 --num_processes=4 --process_id=0   # then 1, 2, 3
"""

if __name__ == "__main__":
    config_flag.define()
    flags.DEFINE_string("workdir", None, "folder of the run: checkpoints, metrics.jsonl, loss.png, TensorBoard events")
    flags.DEFINE_string("coordinator", None, "HOST:PORT where process 0 of several listens; PORT + 1 is JAX's")
    flags.DEFINE_integer("num_processes", None, "how many processes there are")
    flags.DEFINE_integer("process_id", None, "which of them this is, from 0")
    flags.DEFINE_enum(
        "distributed", "auto", ["auto", "on", "off"], "whether to look for other processes; on: they must be"
    )


def main() -> None:
    """Reads the flags, trains, reports."""
    from rich.console import Console

    from ml.config import build
    from ml.errors import UserError
    from ml.parallel.processes import find_launch, join
    from ml.train.config import ExperimentConfig
    from ml.train.loop import train
    from ml.train.reporting import print_report
    from ml.train.summary import summarize

    if not flags.FLAGS.workdir:
        raise UserError("--workdir is missing; name the folder of the run, such as --workdir=runs/first")
    config = build(ExperimentConfig, config_flag.load().to_dict())
    given = flags.FLAGS
    launch = find_launch(
        given.distributed, given.coordinator, given.num_processes, given.process_id, config.health.start_seconds
    )
    with join(launch, config.health) as watch:
        result = train(config, given.workdir, watch)
    first = launch is None or launch.process_id == 0
    if result.interrupted:
        if first:
            print(f"saved at step {result.step}; run the same command again to go on", file=sys.stderr)
        sys.exit(0 if result.interrupted == signal.SIGTERM else 130)
    if first:
        print_report(summarize(result), Console(stderr=True))


if __name__ == "__main__":
    app.run(main, usage=_USAGE)
