"""`scripts/train.py` as a user runs it, in an interpreter of its own."""

import json
import os
import subprocess
import sys

from script_processes import ROOT, error_of, run
from training_cases import write_config


def test_a_run_from_the_command_line(tmp_path):
    config = write_config(tmp_path)
    command = [sys.executable, "scripts/train.py", f"--config={config}", f"--workdir={tmp_path / 'w'}"]
    # With a worker process, which imports the script once more.
    command += ["--config.train.steps=6", "--config.eval.every=3", "--config.data.num_workers=1"]
    environment = os.environ | {"XLA_FLAGS": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600, check=False)
    assert done.returncode == 0 and not done.stdout, done.stderr
    for told in ("memory: ", "step 6/6", "gzip -9", "this model", "xz -9", "loss.png", "metrics.jsonl"):
        assert told in done.stderr
    rows = [json.loads(line) for line in (tmp_path / "w" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all({"loss", "tokens", "learning_rate", "gradient_norm"} <= row.keys() for row in rows)
    assert sorted(path.name for path in (tmp_path / "w" / "checkpoints").iterdir() if path.name.isdigit()) == ["4", "6"]

    finished = run("train.py", f"--config={config}", f"--workdir={tmp_path / 'w'}", "--config.train.steps=6")
    assert finished.returncode == 0 and "going on from the checkpoint of step 6" in finished.stderr

    other = run("train.py", f"--config={config}", f"--workdir={tmp_path / 'w'}", "--config.seed=5")
    assert "holds a run with config.eval.every=" not in other.stderr
    assert error_of(other).endswith("config.seed=0, but now it is 5; use another --workdir, or restore the value")
