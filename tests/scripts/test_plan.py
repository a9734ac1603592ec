"""`scripts/plan.py`: the table, the flags to paste, and mistakes in the input."""

import re

import pytest
from script_processes import error_of, run

JOB = ("--config=configs/lm/quickstart.py", "--topology=v5e:2x4")


def test_ranks_and_prints_flags():
    done = run("plan.py", *JOB, "--top=3", "--global_batch=64", "--efficiency=0.5")
    assert done.returncode == 0, done.stderr
    assert "8 x TPU v5e fit. Predicted, not measured: matrix products at 50% of peak" in done.stdout.replace("\n", " ")
    (flags,) = re.findall(r"^1: (.*)$", done.stdout, re.MULTILINE)
    assert re.fullmatch(r"(--config\.[a-z_.]+=\w+ ?)+", flags)
    assert flags.endswith("--config.train.batch_size=64") and "--config.mesh.layout=" in flags
    assert len(re.findall(r"^│ +\d", done.stdout, re.MULTILINE)) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((JOB[0],), "--topology is missing"),
        ((JOB[0], "--topology=v7:2x2"), "unknown family 'v7'"),
        ((*JOB, "--global_batch=0"), "--global_batch"),
        ((*JOB, "--efficiency=2"), "--efficiency"),
        ((*JOB, "--config.model.num_laers=2"), "num_layers"),
        (("--config=configs/resnet/digits.py", "--topology=v5e:4x4"), "config.model.kind='resnet': the planner knows"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    assert message in error_of(run("plan.py", *arguments))
