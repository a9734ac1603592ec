"""`scripts/make_pictures.py`: a recording that leaves out nothing but repetition, and images that stand alone."""

from run_folders import write_run
from script_processes import error_of, run

LOG = """make env
installing
memory: 159 MiB a device
{steps}
evaluating on the whole held-out text

──────── result ────────
this model  1.662  ████
metrics     {root}/runs/quickstart/metrics.jsonl
real\t1m
"""


def test_pictures_of_a_run(tmp_path):
    folder = write_run(tmp_path / "runs" / "quickstart")
    steps = "\n".join(f"step {step}/240  loss 5.{step:03}" for step in range(1, 241))
    (tmp_path / "log").write_text(LOG.format(steps=steps, root=tmp_path))
    flags = (f"--log={tmp_path / 'log'}", f"--run={folder}", f"--output={tmp_path / 'out'}")
    done = run("make_pictures.py", *flags)
    assert done.returncode == 0, done.stderr
    terminal = (tmp_path / "out" / "quickstart.svg").read_text().replace("&#160;", " ")
    for told in ("$ make quickstart", "memory: 159", "step 1/240", "step 240/240", "...", "this model  1.662"):
        assert told in terminal
    assert "step 100/240" not in terminal and "installing" not in terminal and "1m" not in terminal
    assert str(tmp_path) not in terminal and "runs/quickstart/metrics.jsonl" in terminal
    for name in ("loss", "trust_ratios"):
        image = (tmp_path / "out" / f"{name}.svg").read_text()
        assert image.startswith("<svg") and "prefers-color-scheme" in image and "--paper:" in image
    assert "there is no such file; make it with" in error_of(run("make_pictures.py", "--log=no", f"--run={folder}"))
