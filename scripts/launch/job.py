"""What every launcher shares: the flags of a job, the training command in it, and the call of the platform's tool."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence

import config_flag
from absl import flags

from ml.errors import UserError
from ml.parallel.processes import RESTART_STATUS

# Shell: whether a run that ended with status $1 is to be started again. 75: a process was lost; above 130: killed by a
# signal (137: SIGKILL, out of memory, 134: aborted). 0: done, 1: a bug, 2: a user's mistake, 130: Ctrl-C.
AGAIN = f'again() {{ [ "$1" -eq {RESTART_STATUS} ] || [ "$1" -gt 130 ]; }}'


def define() -> None:
    """Defines the flags that all launchers have, and ``--config`` with its overrides."""
    config_flag.define()
    flags.DEFINE_string("name", None, "of the job: letters, digits and hyphens")
    flags.DEFINE_string("workdir", None, "folder of the run, as the job's machines see it; all must share it")
    flags.DEFINE_integer("restarts", 100, "how often a job that lost a process is started again")
    flags.DEFINE_boolean("print", False, "only show what would be done; needs no tool of the platform")


def check() -> None:
    """Refuses what would only fail once the job runs.

    Raises:
      UserError: a flag is missing or malformed, or the experiment cannot be built.
    """
    from ml.config import build
    from ml.train.config import ExperimentConfig

    require("name", "workdir")
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", flags.FLAGS.name):
        raise UserError(
            f"--name={flags.FLAGS.name} must be at most 40 small letters, digits and hyphens, and begin with a letter"
        )
    if flags.FLAGS.restarts < 0:
        raise UserError(f"--restarts={flags.FLAGS.restarts} must not be negative")
    build(ExperimentConfig, config_flag.load().to_dict())


def require(*names: str) -> None:
    """Raises `UserError` for the first of these flags that was not given."""
    for name in names:
        if not flags.FLAGS[name].value:
            raise UserError(f"--{name} is missing; {flags.FLAGS[name].help}")


def train_command(python: str = "python") -> list[str]:
    """``scripts/train.py`` with this command line's experiment; where processes find one another is not in it."""
    overrides = [argument for argument in sys.argv[1:] if argument.lstrip("-").startswith("config.")]
    command = [python, "scripts/train.py", f"--config={flags.FLAGS.config}", f"--workdir={flags.FLAGS.workdir}"]
    return command + [f"--{argument.lstrip('-')}" for argument in overrides]


def run(commands: Sequence[Sequence[str]], install: str, given: str | None = None) -> None:
    """Runs commands of the platform's tool, or with ``--print`` shows them.

    Args:
      commands: one after another, until one fails.
      install: how to get the tool.
      given: to the standard input of the last.

    Raises:
      UserError: the tool is missing, or it failed.
    """
    if flags.FLAGS.print:
        for command in commands:
            print(shlex.join(command))
        return
    for number, command in enumerate(commands):
        if shutil.which(command[0]) is None:
            raise UserError(f"{command[0]} is not installed here; {install}; --print shows what would be run")
        last = number == len(commands) - 1
        done = subprocess.run(command, input=given if last else None, text=True, check=False)
        if done.returncode:
            raise UserError(f"{shlex.join(command[:4])} ... failed with status {done.returncode}; it says above why")
