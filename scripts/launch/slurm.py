"""Submits a training job to SLURM: one process on each node, started again when a process or a node is lost."""

import os
import shlex
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import app
import job
from absl import flags

from ml.errors import UserError

_USAGE = """
Submits a training job to SLURM, one process a node; --print shows the script instead.

  python scripts/launch/slurm.py --name=first --nodes=4 --gpus=8 --time=24:00:00 --config=configs/lm/llama3_8b.py \\
      --workdir=/shared/runs/first --config.mesh.fsdp=32
"""
_BEFORE_THE_END = 180  # seconds of warning before the time limit: enough to save

if __name__ == "__main__":
    job.define()
    flags.DEFINE_integer("nodes", 1, "machines; a process on each")
    flags.DEFINE_integer("gpus", 8, "GPUs of each node; 0: none are asked for")
    flags.DEFINE_integer("cpus", 0, "CPU cores of each node; 0: whatever the partition gives")
    flags.DEFINE_string(
        "time", "", "time limit as SLURM writes it, D-HH:MM:SS; the job saves and is queued again before"
    )
    flags.DEFINE_string("partition", "", "SLURM partition")
    flags.DEFINE_string("account", "", "SLURM account")
    flags.DEFINE_string("image", "", "container image for srun --container-image (pyxis); empty: none")
    flags.DEFINE_string("python", "python", "interpreter on the nodes")


def script() -> str:
    """The batch script."""
    given = flags.FLAGS
    options = {
        "job-name": given.name,
        "nodes": given.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": given.gpus,
        "cpus-per-task": given.cpus,
        "time": given.time,
        "partition": given.partition,
        "account": given.account,
        "output": f"{given.name}-%j.out",
        "open-mode": "append",
        "signal": f"B:TERM@{_BEFORE_THE_END}",
    }
    header = "".join(f"#SBATCH --{name}={value}\n" for name, value in options.items() if value)
    train = shlex.join(job.train_command(given.python))
    # Each task sees its own number; --wait leaves the others time to say which process was lost.
    task = f'exec {train} --coordinator="$COORDINATOR" --num_processes="$SLURM_NTASKS" --process_id="$SLURM_PROCID"'
    srun = ["srun", "--kill-on-bad-exit=0", "--wait=300"]
    if given.image:
        srun += [f"--container-image={given.image}", "--container-mount-home", f"--container-workdir={os.getcwd()}"]
    return f"""#!/bin/bash
{header}#SBATCH --requeue
# Process 0 runs on the first node. The port depends on the job, so that two jobs may share a node.
COORDINATOR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$((20000 + 2 * (SLURM_JOB_ID % 5000)))"
export COORDINATOR
{job.AGAIN}
out_of_time=
{shlex.join(srun)} bash -c {shlex.quote(task)} &
step=$!
trap 'out_of_time=1; kill -TERM "$step"' TERM
while wait "$step"; status=$?; kill -0 "$step" 2>/dev/null; do :; done
if {{ [ -n "$out_of_time" ] || again "$status"; }} && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {given.restarts} ]; then
  echo "status $status: queued again; goes on from the newest whole checkpoint" >&2
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


def main() -> None:
    """Reads the flags, submits."""
    job.check()
    given = flags.FLAGS
    for name, least in (("nodes", 1), ("gpus", 0), ("cpus", 0)):
        if getattr(given, name) < least:
            raise UserError(f"--{name}={getattr(given, name)} must be at least {least}")
    text = script()
    if given.print:
        print(text, end="")
        return
    job.run([["sbatch"]], "submit from a login node of the cluster", text)


if __name__ == "__main__":
    app.run(main, usage=_USAGE)
