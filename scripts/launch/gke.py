"""Runs a training job on Google Kubernetes Engine as a JobSet: TPU slices, or nodes with GPUs."""

import os
import shlex
import sys
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import app
import job
import tpu_types
from absl import flags

from ml.errors import UserError

_USAGE = """
Runs a training job on GKE as a JobSet (https://jobset.sigs.k8s.io); --print shows the YAML instead.

  python scripts/launch/gke.py --name=first --tpu=v5e --topology=4x8 --slices=2 --claim=shared \\
      --workdir=/share/runs/first --image=us-docker.pkg.dev/mine/images/megabatch \\
      --config=configs/lm/llama3_8b.py --config.mesh.fsdp=32
  python scripts/launch/gke.py --name=first --gpu=nvidia-h100-80gb --nodes=4 ...
"""
_PORT = 8476
_WORKERS = "workers"
_USER_ERROR = 2

if __name__ == "__main__":
    job.define()
    flags.DEFINE_string("tpu", "", f"TPU generation: {', '.join(tpu_types.TPU_TYPES)}")
    flags.DEFINE_string("topology", None, "chips of a TPU slice, such as 4x8 (v5e, v6e) or 2x2x4 (v4, v5p, tpu7x)")
    flags.DEFINE_integer("slices", 1, "TPU slices, connected by the data-centre network")
    flags.DEFINE_string("gpu", "", "GKE's name of the GPU instead of a TPU, such as nvidia-h100-80gb")
    flags.DEFINE_integer("nodes", 1, "machines with GPUs")
    flags.DEFINE_integer("gpus", 8, "GPUs of each")
    flags.DEFINE_string("image", None, "container image with this repository as its working directory")
    flags.DEFINE_string("claim", None, "PersistentVolumeClaim (ReadWriteMany) that all pods mount at /share")
    flags.DEFINE_string("namespace", "default", "Kubernetes namespace")
    flags.DEFINE_boolean("spot", False, "on spot machines, which may be taken away")


def job_set() -> dict[str, Any]:
    """The JobSet: it is started again as a whole when a pod is lost, and not at all after a user's mistake."""
    given = flags.FLAGS
    command = shlex.join(job.train_command())
    if given.tpu:
        kind = tpu_types.tpu_type(given.tpu)
        jobs, pods = given.slices, tpu_types.hosts(given.topology, kind)
        resources = {"google.com/tpu": tpu_types.chips(given.topology, kind) // pods}
        selector = {
            "cloud.google.com/gke-tpu-accelerator": kind.gke,
            "cloud.google.com/gke-tpu-topology": given.topology,
        }
    else:
        jobs, pods, resources = 1, given.nodes, {"nvidia.com/gpu": given.gpus}
        selector = {"cloud.google.com/gke-accelerator": given.gpu}
        # JobSet's name of the first pod; the shell puts in the number that an indexed Job gives each pod.
        first = f"{given.name}-{_WORKERS}-0-0.{given.name}:{_PORT}"
        command += f' --coordinator={first} --num_processes={pods} --process_id="$JOB_COMPLETION_INDEX"'
    if given.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    container = {
        "name": "train",
        "image": given.image,
        "command": ["bash", "-c", f"exec {command}"],
        "resources": {"limits": resources},
        "volumeMounts": [{"name": "share", "mountPath": "/share"}, {"name": "memory", "mountPath": "/dev/shm"}],
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 180,  # SIGTERM saves
        "nodeSelector": selector,
        "containers": [container],
        "volumes": [
            {"name": "share", "persistentVolumeClaim": {"claimName": given.claim}},
            {"name": "memory", "emptyDir": {"medium": "Memory"}},
        ],
    }
    mistake = {
        "action": "FailJob",
        "onExitCodes": {"containerName": "train", "operator": "In", "values": [_USER_ERROR]},
    }
    spec = {
        "parallelism": pods,
        "completions": pods,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [mistake]},
        "template": {"spec": pod},
    }
    metadata: dict[str, Any] = {"name": given.name, "namespace": given.namespace}
    if given.tpu:
        exclusive = "alpha.jobset.sigs.k8s.io/exclusive-topology"
        metadata["annotations"] = {exclusive: "cloud.google.com/gke-nodepool"}  # a slice is a node pool
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {
                "maxRestarts": given.restarts,
                "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": _WORKERS, "replicas": jobs, "template": {"spec": spec}}],
        },
    }


def main() -> None:
    """Reads the flags, submits."""
    import yaml

    job.check()
    given = flags.FLAGS
    if bool(given.tpu) == bool(given.gpu):
        raise UserError("give one of --tpu (such as v5e) and --gpu (such as nvidia-h100-80gb)")
    job.require("image", "claim", *(["topology"] if given.tpu else []))
    for name in ("slices", "nodes", "gpus"):
        if getattr(given, name) < 1:
            raise UserError(f"--{name}={getattr(given, name)} must be at least 1")
    if not given.workdir.startswith("/share/"):
        raise UserError(f"--workdir={given.workdir} must lie in /share, where --claim is mounted in every pod")
    text = yaml.safe_dump(job_set(), sort_keys=False, width=1000)
    if given.print:
        print(text, end="")
        return
    job.run([["kubectl", "apply", "-f", "-"]], "install kubectl (https://kubernetes.io/docs/tasks/tools)", text)


if __name__ == "__main__":
    app.run(main, usage=_USAGE)
