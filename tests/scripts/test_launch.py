"""The launchers: their YAML and shell are well-formed, say what was asked, and start again when they should."""

import os
import shlex
import subprocess

import pytest
import yaml
from script_processes import error_of, run

CONFIG = "--config=configs/lm/quickstart.py"
SLURM = ("launch/slurm.py", "--name=first", "--workdir=/shared/r", CONFIG, "--config.train.steps=5")
TPU = (
    "launch/tpu.py --name=first --workdir=/share/r --topology=4x8 --project=p --zone=z --image=eu-docker.pkg.dev/p/i/m "
    f"--share=gs://b {CONFIG} --config.train.steps=5"
).split()
GKE = f"launch/gke.py --name=first --workdir=/share/r --image=i --claim=c {CONFIG} --config.data.num_workers=1".split()


def shown(*arguments):
    done = run(*arguments, "--print")
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_shell(text):
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


@pytest.mark.parametrize(
    ("statuses", "more", "ends", "requeued"),
    [
        ([75], (), 0, True),  # a process was lost
        ([137], (), 0, True),  # killed
        ([0], (), 0, False),
        ([2], (), 2, False),  # a user's mistake is not mended by trying again
        ([75], ("--restarts=3",), 75, False),  # the fourth start
    ],
)
def test_slurm_queues_a_job_again_that_lost_a_process(tmp_path, statuses, more, ends, requeued):
    script = shown(*SLURM, "--nodes=2", "--time=1:00:00", "--partition=big", *more)
    check_shell(script)
    for option in ("--nodes=2", "--gpus-per-node=8", "--time=1:00:00", "--partition=big", "--requeue"):
        assert f"#SBATCH {option}\n" in script
    # What the script calls, as programs that note their arguments.
    (tmp_path / "srun").write_text(f'#!/bin/bash\nshift 2\necho "$COORDINATOR" "$@" >> calls\nexit {statuses[0]}\n')
    (tmp_path / "scontrol").write_text('#!/bin/bash\n[ $1 = show ] && printf "n1\\nn2\\n" || echo "$@" >> requeued\n')
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "12345",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_RESTART_COUNT": "3",
    }
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, check=False)
    assert done.returncode == ends
    assert (tmp_path / "requeued").exists() == requeued
    called = (tmp_path / "calls").read_text()
    assert called.startswith("n1:24690 bash -c exec python scripts/train.py") and "--config.train.steps=5" in called


def test_slurm_warns_before_the_time_is_over_and_goes_on_in_a_new_job(tmp_path):
    script = shown(*SLURM)
    # A step that ends well once it is asked to, as a run that has saved.
    (tmp_path / "srun").write_text("#!/bin/bash\ntrap 'exit 0' TERM\ntouch started\nwhile true; do sleep 0.05; done\n")
    (tmp_path / "scontrol").write_text('#!/bin/bash\n[ $1 = show ] && echo n1 || echo "$@" >> requeued\n')
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n1"}
    job = subprocess.Popen(["bash", "-c", script], cwd=tmp_path, env=environment)
    while not (tmp_path / "started").exists():
        assert job.poll() is None
    job.terminate()
    assert job.wait() == 0
    assert (tmp_path / "requeued").read_text() == "requeue 1\n"


def test_tpu(tmp_path):
    text = shown(*TPU, "--slices=2", "--spot")
    check_shell(text)
    script = text.partition("\n")[2].partition("END_OF_SCRIPT")[0]
    check_shell(script)
    assert "gcsfuse --implicit-dirs b /share" in script
    assert "gcloud auth configure-docker eu-docker.pkg.dev --quiet" in script
    assert "eu-docker.pkg.dev/p/i/m python scripts/train.py" in script and "--config.train.steps=5" in script
    (create,) = (
        shlex.split(line) for line in text.splitlines() if line.startswith("gcloud compute") and "create" in line
    )
    assert {"--accelerator-type=v5litepod-32", "--node-count=2", "--node-prefix=first", "--spot"} <= set(create)
    assert "--node-id=first" in shown(*TPU)
    assert "--accelerator-type=v4-32" in shown(*TPU, "--tpu=v4", "--topology=2x2x4")
    assert "mount -t nfs host:/export /share" in shown(*TPU, "--share=host:/export")


def test_gke_tpu_slices():
    job_set = yaml.safe_load(shown(*GKE, "--tpu=v5e", "--topology=4x8", "--slices=3", "--spot", "--restarts=7"))
    assert job_set["kind"] == "JobSet" and job_set["metadata"]["name"] == "first"
    assert job_set["spec"]["failurePolicy"]["maxRestarts"] == 7
    (workers,) = job_set["spec"]["replicatedJobs"]
    spec = workers["template"]["spec"]
    assert (workers["replicas"], spec["parallelism"], spec["completions"], spec["backoffLimit"]) == (3, 8, 8, 0)
    pod = spec["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x8",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    *_, command = container["command"]
    check_shell(command)
    assert "--config.data.num_workers=1" in command and "--coordinator" not in command
    # A user's mistake ends all: its status fails the job, and a job that failed for that is not started again.
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2])
    assert job_set["spec"]["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]


@pytest.mark.parametrize(
    ("tpu", "topology", "pods", "chips"),
    [
        ("v5e", "2x4", 1, 8),
        ("v5e", "2x2", 1, 4),
        ("v6e", "16x16", 64, 4),
        ("v5p", "2x2x4", 4, 4),
        ("tpu7x", "2x2x1", 1, 4),
    ],
)
def test_gke_hosts_of_a_topology(tpu, topology, pods, chips):
    spec = yaml.safe_load(shown(*GKE, f"--tpu={tpu}", f"--topology={topology}"))["spec"]["replicatedJobs"][0][
        "template"
    ]
    assert spec["spec"]["completions"] == pods
    (container,) = spec["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["google.com/tpu"] == chips


def test_gke_gpus():
    (workers,) = yaml.safe_load(shown(*GKE, "--gpu=nvidia-h100-80gb", "--nodes=4"))["spec"]["replicatedJobs"]
    pod = workers["template"]["spec"]["template"]["spec"]
    assert workers["template"]["spec"]["completions"] == 4
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    *_, command = pod["containers"][0]["command"]
    wanted = "--coordinator=first-workers-0-0.first:8476 --num_processes=4 --process_id=3"
    env = {"JOB_COMPLETION_INDEX": "3", "PATH": os.environ["PATH"]}
    echoed = subprocess.run(["bash", "-c", command.replace("exec", "echo", 1)], env=env, capture_output=True, text=True)
    assert echoed.stdout.strip().endswith(wanted)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*SLURM, "--name="), "--name is missing"),
        ((*SLURM, "--name=Big_Job"), "--name=Big_Job must be"),
        ((*SLURM, "--nodes=0"), "--nodes=0 must be at least 1"),
        ((*SLURM, "--config.train.stepz=5"), "config.train.stepz: no such key; did you mean '--config.train.steps'"),
        ((*TPU, "--topology=4x4x4"), "--topology=4x4x4 must have 2 dimensions"),
        ((*TPU, "--tpu=v7"), "--tpu=v7: no such TPU"),
        ((*TPU, "--tpu=tpu7x", "--topology=2x2x4"), "--tpu=tpu7x is offered through GKE only"),
        ((*TPU, "--workdir=/home/r"), "--workdir=/home/r must lie in /share"),
        (GKE, "give one of --tpu (such as v5e) and --gpu"),
        ((*GKE, "--tpu=v5e", "--topology=3x3"), "--topology=3x3: 9 chips do not fill machines of 4"),
    ],
)
def test_mistakes_are_named(arguments, message):
    assert message in error_of(run(*arguments, "--print"))


@pytest.mark.parametrize(
    ("arguments", "tool"), [(SLURM, "sbatch"), (TPU, "gcloud"), ((*GKE, "--tpu=v5e", "--topology=2x4"), "kubectl")]
)
def test_a_tool_that_is_missing_is_named_and_one_that_is_there_is_run(tmp_path, arguments, tool):
    # Nothing but this folder: on a machine that has the real tool, a test must not come near it.
    path = f"import os; os.environ['PATH'] = {str(tmp_path)!r}"
    assert f"{tool} is not installed here; " in error_of(run(*arguments, before=path))
    (tmp_path / tool).write_text(f'#!/bin/bash\necho "$@" > {tmp_path}/arguments\n/bin/cat > {tmp_path}/input\n')
    (tmp_path / tool).chmod(0o755)
    assert run(*arguments, before=path).returncode == 0
    told = (tmp_path / "arguments").read_text() + (tmp_path / "input").read_text()
    assert "first" in told
    (tmp_path / tool).write_text("#!/bin/bash\nexit 3\n")
    assert "failed with status 3" in error_of(run(*arguments, before=path))
