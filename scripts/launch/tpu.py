"""Asks Cloud TPU for a slice or several (queued resources) and trains there, from the machines' start on."""

import os
import shlex
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import app
import job
import tpu_types
from absl import flags

from ml.errors import UserError

_USAGE = """
Asks Cloud TPU for machines and trains on them; --print shows the commands and the machines' start script instead.

  python scripts/launch/tpu.py --name=first --tpu=v5e --topology=4x8 --spot --keep --project=mine --zone=us-west4-a \\
      --image=us-docker.pkg.dev/mine/images/megabatch --share=gs://my-bucket --workdir=/share/runs/first \\
      --config=configs/lm/llama3_8b.py --config.mesh.fsdp=32
"""
_INSTALL = "install the Google Cloud CLI (https://cloud.google.com/sdk/docs/install)"
_GONE = ("SUSPENDED", "FAILED")
_POLL_SECONDS = 60.0

if __name__ == "__main__":
    job.define()
    flags.DEFINE_string(
        "tpu", "v5e", f"generation: {', '.join(name for name, t in tpu_types.TPU_TYPES.items() if t.runtime)}"
    )
    flags.DEFINE_string("topology", None, "chips of a slice, such as 4x8 (v5e, v6e) or 2x2x4 (v4, v5p)")
    flags.DEFINE_integer("slices", 1, "slices, connected by the data-centre network")
    flags.DEFINE_string("project", None, "Google Cloud project")
    flags.DEFINE_string("zone", None, "Google Cloud zone")
    flags.DEFINE_string("image", None, "container image with this repository as its working directory")
    flags.DEFINE_string(
        "share", None, "what all machines share, mounted at /share: gs://BUCKET, or HOST:/EXPORT of an NFS server"
    )
    flags.DEFINE_boolean("spot", False, "cheaper machines that may be taken away")
    flags.DEFINE_boolean("keep", False, "stay, and ask again whenever the machines were taken away")


def start_script() -> str:
    """What each machine runs when it starts: mount the share, then train until there is no reason to start again."""
    given = flags.FLAGS
    if given.share.startswith("gs://"):
        mount = f"gcsfuse --implicit-dirs {shlex.quote(given.share.removeprefix('gs://'))} /share"
    else:
        mount = f"mount -t nfs {shlex.quote(given.share)} /share"
    registry = given.image.partition("/")[0]
    login = f"gcloud auth configure-docker {shlex.quote(registry)} --quiet\n" if registry.endswith("pkg.dev") else ""
    # Host network and privileges: the TPU's devices, and the addresses that JAX finds in the machine's metadata.
    docker = ["docker", "run", "--rm", "--net=host", "--privileged", "-v", "/share:/share", given.image]
    return f"""#!/bin/bash
{job.AGAIN}
mkdir -p /share
mountpoint -q /share || {mount} || exit 1
{login}for ((start = 0; start <= {given.restarts}; start++)); do
  {shlex.join(docker + job.train_command())}
  status=$?
  again "$status" || break
  sleep 10
done
exit "$status"
"""


def commands(script: str) -> tuple[list[str], list[str], list[str]]:
    """The commands that ask for the machines, that give them back, and that tell in which state the request is."""
    given = flags.FLAGS
    kind = tpu_types.tpu_type(given.tpu)
    where = [f"--project={given.project}", f"--zone={given.zone}"]
    base = ["gcloud", "compute", "tpus", "queued-resources"]
    nodes = [f"--node-count={given.slices}", f"--node-prefix={given.name}"]
    create = [
        *base,
        "create",
        given.name,
        *(nodes if given.slices > 1 else [f"--node-id={given.name}"]),
        *where,
        f"--accelerator-type={kind.cloud}-{kind.cores * tpu_types.chips(given.topology, kind)}",
        f"--runtime-version={kind.runtime}",
        *(["--spot"] if given.spot else []),
        f"--metadata-from-file=startup-script={script}",
    ]
    delete = [*base, "delete", given.name, *where, "--force", "--quiet"]
    state = [*base, "describe", given.name, *where, "--format=value(state.state)"]
    return create, delete, state


def main() -> None:
    """Reads the flags, asks for machines."""
    job.check()
    given = flags.FLAGS
    job.require("topology", "project", "zone", "image", "share")
    if given.slices < 1:
        raise UserError(f"--slices={given.slices} must be at least 1")
    if not tpu_types.tpu_type(given.tpu).runtime:
        raise UserError(f"--tpu={given.tpu} is offered through GKE only; use scripts/launch/gke.py")
    if not given.workdir.startswith("/share/"):
        raise UserError(f"--workdir={given.workdir} must lie in /share, where --share is mounted on every machine")
    if given.print:
        create, delete, _ = commands("start.sh")
        print(f"cat > start.sh <<'END_OF_SCRIPT'\n{start_script()}END_OF_SCRIPT")
        print(shlex.join(create))
        print(f"# when it is over, or before asking again:\n# {shlex.join(delete)}")
        return
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as script:
        script.write(start_script())
        script.flush()
        create, delete, state = commands(script.name)
        job.run([create], _INSTALL)
        while given.keep:
            time.sleep(_POLL_SECONDS)
            asked = subprocess.run(state, capture_output=True, text=True, check=False)
            if asked.returncode == 0 and asked.stdout.strip() in _GONE:
                print(f"{given.name} is {asked.stdout.strip()}; asking again", file=sys.stderr)
                job.run([delete, create], _INSTALL)


if __name__ == "__main__":
    app.run(main, usage=_USAGE)
