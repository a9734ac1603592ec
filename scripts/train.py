"""Trains a language model; run it again with the same flags to go on from the newest checkpoint."""

import signal
import sys

import app
import config_flag
from absl import flags

_USAGE = """
Trains a language model. The same command again goes on from the newest checkpoint.

  python scripts/train.py --config=configs/lm/quickstart.py --workdir=runs/first --config.train.steps=100
"""

if __name__ == "__main__":
    config_flag.define()
    flags.DEFINE_string("workdir", None, "folder of the run: checkpoints, metrics.jsonl, loss.png, TensorBoard events")


def main() -> None:
    """Reads the flags, trains, reports."""
    from rich.console import Console

    from ml.config import build
    from ml.errors import UserError
    from ml.train.config import ExperimentConfig
    from ml.train.loop import train
    from ml.train.reporting import print_report
    from ml.train.summary import summarize

    if not flags.FLAGS.workdir:
        raise UserError("--workdir is missing; name the folder of the run, such as --workdir=runs/first")
    result = train(build(ExperimentConfig, config_flag.load().to_dict()), flags.FLAGS.workdir)
    if result.interrupted:
        print(f"saved at step {result.step}; run the same command again to go on", file=sys.stderr)
        sys.exit(0 if result.interrupted == signal.SIGTERM else 130)
    print_report(summarize(result), Console(stderr=True))


if __name__ == "__main__":
    app.run(main, usage=_USAGE)
