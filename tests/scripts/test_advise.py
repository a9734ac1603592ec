"""`scripts/advise.py`: a table, the same as JSON, a probe, and mistakes in the input."""

import json

import pytest
from script_processes import error_of, run
from training_cases import write_config

QUICKSTART = "--config=configs/lm/quickstart.py"


def test_a_table_with_every_source_and_the_flags():
    done = run("advise.py", QUICKSTART, "--tokens=20M", "--topology=v5e:2x2")
    assert done.returncode == 0, done.stderr
    assert "20,000,000 tokens, 3," in done.stdout
    for name in ("global batch", "peak learning rate", "warm-up", "steps", "microbatches", "memory per device"):
        assert f" {name} " in done.stdout
    assert "note: Step Law: tokens=2e+07 is outside of 4e+09 to 1e+11" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("--config.train.steps=")


@pytest.mark.slow
def test_a_probe_measures_and_its_run_is_kept(tmp_path):
    arguments = (f"--config={write_config(tmp_path)}", "--tokens=1e6", "--json=-", "--config.train.log_every=5")
    done = run("advise.py", *arguments, "--measure", "--probe_steps=32", f"--workdir={tmp_path / 'probe'}")
    assert done.returncode == 0, done.stderr
    advice = json.loads(done.stdout)
    noise, batch = advice["numbers"]["noise scale"], advice["numbers"]["global batch"]
    assert noise["interval"][0] < noise["value"] < noise["interval"][1]
    assert "second half of 32 steps" in noise["source"] and "noise scale, measured" in batch["source"]
    assert advice["overrides"]["train.batch_size"] == batch["value"]
    rows = (tmp_path / "probe" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 32 and all(json.loads(row)["noise_variance"] > 0 for row in rows)
    again = run("advise.py", *arguments, "--measure", f"--workdir={tmp_path / 'probe'}")
    assert "is not empty; name a new folder" in error_of(again)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((QUICKSTART,), "--tokens is missing"),
        ((QUICKSTART, "--tokens=many"), "--tokens=many: not a number of tokens"),
        ((QUICKSTART, "--tokens=1k"), "--tokens=1,000 is too few"),
        (("--config=configs/lm/quickstat.py", "--tokens=1B"), "quickstart.py"),
        (("--config=configs/basic/tiny_cpu.py", "--tokens=1B"), "config.model.kind='two_tower': the advisor knows"),
        ((QUICKSTART, "--tokens=1B", "--topology=v7:2x2"), "unknown family 'v7'"),
        ((QUICKSTART, "--tokens=1B", "--topology=2*v5e:2x2", "--global_batch=7"), "batch of 7"),
        ((QUICKSTART, "--tokens=1B", "--check"), "--check compiles for a --topology"),
        ((QUICKSTART, "--tokens=1B", "--workdir=x"), "--workdir is for the probe of --measure"),
        ((QUICKSTART, "--tokens=1B", "--json=/no/such/folder/x.json"), "--json=/no/such/folder/x.json"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    assert message in error_of(run("advise.py", *arguments))
