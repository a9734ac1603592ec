"""`scripts/preflight.py`: a job that does not fit, and every mistake in the input."""

import json

import pytest
from script_processes import error_of, run

QUICKSTART = "--config=configs/lm/quickstart.py"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--topology is missing"),
        (["--topology=v5e:16x17"], "the nearest is v5e:16x16"),
        (["--topology=v5e:4x4", "--serve"], "--serve: the serving engine has no decode step"),
        (["--topology=v5e:4x4", "--layout=zero4"], "config.mesh.layout: 'zero4' is not one of"),
        (["--topology=v5e:2x4", "--config.mesh.fsdp=3"], "config.mesh"),
        (["--topology=v5e:2x4", "--config.train.batch_size=12"], "config.train.batch_size=12"),
        (["--topology=v5e:2x4", "--json=/no/such/folder/x.json"], "--json=/no/such/folder/x.json"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    pytest.importorskip("libtpu", reason="libtpu has no wheel for this machine")
    assert message in error_of(run("preflight.py", QUICKSTART, *arguments))


def test_a_job_that_does_not_fit_ends_with_status_1_and_its_mends(tmp_path):
    """The compiler refuses Llama 70B at once: 32 sequences of 8192 a device are not cut into microbatches."""
    pytest.importorskip("libtpu", reason="libtpu has no wheel for this machine")
    path = tmp_path / "report.json"
    job = ("--config=configs/lm/llama3_70b.py", "--topology=v5p:8x8x8", "--config.mesh.tensor=8", f"--json={path}")
    done = run("preflight.py", *job, "--config.train.microbatches=1", "--config.train.batch_size=2048")
    assert done.returncode == 1, done.stderr
    (verdict,) = [line for line in done.stdout.splitlines() if line.startswith("does not fit")]
    assert "of 95.7 GiB: try --config.train.microbatches=" in verdict
    report = json.loads(path.read_text())
    assert report["fits"] is False and report["memory"]["needed"] > 300 * 2**30
    assert report["roofline"] is None and report["mends"][0]["bytes"] < report["memory"]["available"]
