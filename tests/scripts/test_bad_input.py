"""Every mistake in a run's input ends in one line that names it and its mend, and leaves nothing half-written."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from script_processes import ROOT, error_of, run
from training_cases import write_config


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """A run with whole checkpoints of its steps 2 and 4."""
    workdir = tmp_path_factory.mktemp("finished") / "w"
    assert run("train.py", f"--config={config}", f"--workdir={workdir}").returncode == 0
    return workdir


@pytest.fixture
def again(finished, tmp_path):
    """A copy of it, to be spoiled."""
    return shutil.copytree(finished, tmp_path / "w")


def train(config, workdir, *more, before=""):
    return run("train.py", f"--config={config}", f"--workdir={workdir}", *more, before=before)


def rows(workdir):
    """The metrics, without what a clock wrote."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    return [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in found]


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


SETTINGS = {
    "unknown key": ("--config.train.step=9", "--config.train.step: no such key; did you mean '--config.train.steps'?"),
    "unknown group": ("--config.trian.steps=9", "did you mean '--config.train'?"),
    "key of another group": ("--config.train.fsdp=2", "did you mean '--config.mesh.fsdp'?"),
    "wrong type": ("--config.train.steps=many", "--config.train.steps=many: expected int, got 'many'"),
    "wrong type in a list": (
        '--config.data.sources=[{"kind": "text", "path": 3}]',
        "config.data.sources[0].path: expected a",
    ),
    "no such choice": ("--config.train.remat=ful", "'offload'; did you mean 'full'?"),
    "no such optimizer": ("--config.optimizer.name=lamp", "no optimizer is called 'lamp'; did you mean 'lamb'?"),
    "unknown option": (
        "--config.optimizer.options.epsilon=0.5",
        "options.epsilon: no such key; did you mean 'eps'?",
    ),
    "out of range": ("--config.train.ema=1.5", "config.train: ema=1.5 must lie in [0, 1)"),
    "zero steps": ("--config.train.steps=0", "steps=0 must be at least 1"),
    "microbatches": ("--config.train.microbatches=3", "microbatches=3 does not divide batch_size=8"),
    "too long": ("--config.data.sequence_length=64", "config.data.sequence_length=64 is longer than the model's"),
    "vocabulary": ("--config.model.vocab_size=270", "model.vocab_size=270 is too small: the tokenizer's ids go up to"),
    "heads": ("--config.model.num_kv_heads=3", "num_heads=2 is not a multiple of num_kv_heads=3"),
    "mesh": ("--config.mesh.tensor=3", "config.mesh.tensor=3 must be one of 1"),
    "no such file": ("--config.data.sources[0].path=CORPUSx", "corpus.jsonlx' does not exist; did you mean"),
    "no such tokenizer": (
        "--config.data.tokenizer.path=nowhere",
        "config.data.tokenizer.path: 'nowhere' does not exist",
    ),
    "init_from": ("--config.train.init_from=nowhere", "config.train.init_from=nowhere needs its own tokenizer"),
    "warm-up": ("--config.schedule.warmup_steps=99", "warmup"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting(config, tmp_path, name):
    flag, message = SETTINGS[name]
    flag = flag.replace("CORPUS", str(config.parent / "corpus.jsonl"))
    workdir = tmp_path / "w"
    assert message in error_of(train(config, workdir, flag))
    # The data may be ready by then, which the next start makes use of; of the run itself there is nothing.
    left = {path.name for path in workdir.iterdir()} if workdir.exists() else set()
    assert left <= {"data", "tokenizer.json", "tokenizer_config.json", "checkpoints"}
    assert not workdir.exists() or not list(workdir.glob("checkpoints/[0-9]*"))


CORPORA = {
    "malformed": (['{"text": "fine"}', '{"text": "cut'], "corpus.jsonl:2: not valid JSON"),
    "not an object": (['{"text": "fine"}', "", "[1]"], "corpus.jsonl:3: a JSON list, not an object"),
    "another key": (
        ['{"txt": "fine"}'],
        "corpus.jsonl:1: no key 'text' (config.data.sources[0].text_field); did you mean",
    ),
    "not a string": (['{"text": "fine"}', '{"text": 5}'], "corpus.jsonl:2: 'text' holds int, not a string"),
    "empty file": ([], "config.data.sources[0]: no text in the 1 file(s) of"),
    "empty texts": (['{"text": ""}', '{"text": ""}'], "config.data.sources[0]: no text in the 1 file(s) of"),
    "too few to hold out": (['{"text": "a b c"}'], "heldout_fraction"),
}


@pytest.mark.parametrize("name", CORPORA)
def test_a_corpus(tmp_path, name):
    config = write_config(tmp_path)
    lines, message = CORPORA[name]
    (tmp_path / "corpus.jsonl").write_text("".join(line + "\n" for line in lines))
    assert message in error_of(train(config, tmp_path / "w"))
    assert not (tmp_path / "w" / "experiment.json").exists()
    # And with the mistake mended the same command runs.
    if name == "malformed":
        write_config(tmp_path)
        assert train(config, tmp_path / "w", "--config.train.steps=1").returncode == 0


@pytest.mark.sweep("unknown key")
@pytest.mark.parametrize("name", ["unknown key", "mesh", "no such file"])
def test_the_same_in_an_interpreter_of_its_own(config, tmp_path, name):
    flag, message = SETTINGS[name]
    flag = flag.replace("CORPUS", str(config.parent / "corpus.jsonl"))
    command = [sys.executable, "scripts/train.py", f"--config={config}", f"--workdir={tmp_path / 'w'}", flag]
    environment = os.environ | {"XLA_FLAGS": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600, check=False)
    assert message in error_of(done)
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "w").exists()


def test_flags_that_are_missing(config, tmp_path):
    assert error_of(run("train.py", f"--config={config}")).startswith("error: --workdir is missing; name")
    assert error_of(run("train.py", f"--workdir={tmp_path / 'w'}")).startswith("error: --config is missing: name")
    nowhere = error_of(run("train.py", "--config=configs/lm/quickstrat.py", f"--workdir={tmp_path / 'w'}"))
    assert "configs/lm/quickstart.py" in nowhere
    assert not (tmp_path / "w").exists()


def test_a_workdir_that_cannot_be(config, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in error_of(train(config, tmp_path / "file" / "w"))
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize(
    ("flag", "key"),
    [("--config.seed=3", "seed=0, but now it is 3"), ("--config.optimizer.name=adamw", "optimizer.name=lamb, but now")],
)
def test_a_workdir_of_another_experiment(config, finished, flag, key):
    before = files(finished)
    message = error_of(train(config, finished, flag))
    assert f"holds a run with config.{key}" in message and "use another --workdir" in message
    assert files(finished) == before


def test_a_workdir_with_a_damaged_experiment(config, again):
    (again / "experiment.json").write_text('{"model": ')
    assert "experiment.json:1: malformed JSON; " in error_of(train(config, again))


def damage(checkpoint, how):
    largest = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    if how == "missing":
        shutil.rmtree(checkpoint / "state")
    elif how == "truncated":
        largest.write_bytes(largest.read_bytes()[:-10])
    else:
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 1
        largest.write_bytes(content)


@pytest.mark.sweep("one bit")
@pytest.mark.parametrize("how", ["truncated", "one bit", "missing"])
def test_a_damaged_checkpoint_is_passed_over(config, finished, again, how):
    damage(again / "checkpoints" / "4", how)
    done = train(config, again)
    assert done.returncode == 0, done.stderr
    assert "checkpoints/4 is not whole" in done.stderr and "trying an older one" in done.stderr
    assert "going on from the checkpoint of step 2" in done.stderr
    assert rows(again) == rows(finished)


def test_when_every_checkpoint_is_damaged_the_run_does_not_begin_anew_by_itself(config, again):
    for step in ("2", "4"):
        damage(again / "checkpoints" / step, "truncated")
    assert "has no whole checkpoint" in error_of(train(config, again))
    assert len((again / "metrics.jsonl").read_text().splitlines()) == 4


# The kernel's own error, at the first byte that is written.
FULL = """
import builtins, os
from ml.train.reporting import metrics_file
metrics_file.open = lambda path, *arguments, **options: builtins.open("/dev/full", *arguments, **options)
"""
FULL_CHECKPOINT = """
from ml.checkpoint import orbax_io
class Failing:
    def result(self):
        raise OSError(28, "No space left on device")
start = orbax_io.start_save
def start_save(checkpoint, *arguments):
    if checkpoint.name != "4":
        return start(checkpoint, *arguments)
    checkpoint.mkdir()
    (checkpoint / "half").write_text("written")
    return Failing()
orbax_io.start_save = start_save
"""
FULL_EXPERIMENT = """
import errno, os, pathlib
write_text = pathlib.Path.write_text
def full(path, *arguments, **options):
    if "experiment.json" in path.name:
        write_text(path, "half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))
    return write_text(path, *arguments, **options)
pathlib.Path.write_text = full
"""


@pytest.mark.slow
def test_a_disk_that_is_full_for_the_metrics(config, tmp_path):
    message = error_of(train(config, tmp_path / "w", before=FULL))
    assert "metrics.jsonl: the disk is full; free some space and start again" in message
    assert train(config, tmp_path / "w", "--config.train.steps=1").returncode == 0


def test_a_disk_that_is_full_for_a_checkpoint(config, finished, tmp_path):
    workdir = tmp_path / "w"
    message = error_of(train(config, workdir, before=FULL_CHECKPOINT))
    assert "checkpoints/4 could not be saved: disk full" in message and "free some space" in message
    assert "the newest whole checkpoint is 2" in message
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {".lock", "2"}
    done = train(config, workdir)
    assert done.returncode == 0 and "going on from the checkpoint of step 2" in done.stderr
    assert rows(workdir) == rows(finished)


def test_a_disk_that_is_full_for_the_experiment(config, tmp_path):
    assert "disk full; free some space" in error_of(train(config, tmp_path / "w", before=FULL_EXPERIMENT))
    assert not [path for path in (tmp_path / "w").iterdir() if "experiment" in path.name]
