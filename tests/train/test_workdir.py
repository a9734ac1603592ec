"""The folder of a run: whose it is, what may change between starts, and what is refused."""

import dataclasses
import json

import pytest

from ml.config import to_dict
from ml.data import DataConfig
from ml.errors import UserError
from ml.models import TransformerConfig
from ml.optim import OptimizerConfig
from ml.train.config import ExperimentConfig, TrainConfig
from ml.train.workdir import Workdir

_MODEL = TransformerConfig(64, 1, 8, 1, 1, 8, 8)
CONFIG = ExperimentConfig(_MODEL, DataConfig(), OptimizerConfig("lamb", 0.01))


def changed(dotted, value, config=CONFIG):
    name, _, rest = dotted.partition(".")
    return dataclasses.replace(config, **{name: changed(rest, value, getattr(config, name)) if rest else value})


@pytest.fixture
def workdir(tmp_path):
    """A run with a checkpoint."""
    workdir = Workdir(tmp_path / "run")
    workdir.claim(CONFIG)
    (workdir.checkpoints / "5").mkdir(parents=True)
    return workdir


def test_the_same_experiment_goes_on(workdir):
    assert workdir.check(CONFIG) == []
    assert json.loads(workdir.experiment.read_text()) == json.loads(json.dumps(to_dict(CONFIG)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.steps", 7),
        ("train.microbatches", 2),
        ("train.remat", "full"),
        ("train.log_every", 3),
        ("train.nonfinite", "skip"),
        ("eval.every", 5),
        ("checkpoint.keep", 9),
        ("mesh.fsdp", 2),
        ("data.num_workers", 3),
    ],
)
def test_what_does_not_touch_the_mathematics_may_change_and_is_told(workdir, key, value):
    (change,) = workdir.check(changed(key, value))
    assert change.startswith(f"config.{key}: ") and change.endswith(f" -> {value}")
    workdir.claim(changed(key, value))
    assert workdir.check(changed(key, value)) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.num_layers", 2),
        ("data.sequence_length", 512),
        ("data.tokenizer.vocab_size", 300),
        ("optimizer.learning_rate", 0.5),
        ("schedule.kind", "cosine"),
        ("train.batch_size", 8),
        ("train.ema", 0.5),
        ("train.init_from", "elsewhere"),
        ("seed", 1),
    ],
)
def test_another_experiment_is_refused_by_its_first_difference(workdir, key, value):
    before = workdir.experiment.read_text()
    with pytest.raises(UserError) as error:
        workdir.check(changed("train.steps", 3, changed(key, value)))
    message = str(error.value)
    assert f"config.{key}=" in message and f"now it is {value};" in message and "another --workdir" in message
    assert "\n" not in message and workdir.experiment.read_text() == before


def test_without_a_checkpoint_the_folder_is_free(tmp_path):
    workdir = Workdir(tmp_path)
    workdir.claim(CONFIG)
    assert workdir.check(changed("seed", 1)) == []


def test_checking_writes_nothing(tmp_path):
    Workdir(tmp_path / "a" / "b").check(CONFIG)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"experiment.json:1: malformed JSON; restore the file"),
        (b'{"model": {},\n "da', r"experiment.json:2: malformed JSON"),
        (b"\xff\xfe\x00", r"experiment.json: not a text file"),
        (b"[1]", r"experiment.json is of no training run"),
        (b'{"model": {}}', r"experiment.json is of no training run.*config.train.init_from"),
    ],
)
def test_a_damaged_experiment_is_named(workdir, content, message):
    workdir.experiment.write_bytes(content)
    with pytest.raises(UserError, match=message):
        workdir.check(CONFIG)


def test_a_key_that_is_younger_than_the_run_stands_at_its_default(workdir):
    values = json.loads(workdir.experiment.read_text())
    del values["train"]["z_loss"]
    workdir.experiment.write_text(json.dumps(values))
    assert workdir.check(CONFIG) == []
    with pytest.raises(UserError, match=r"config.train.z_loss=0.0, but now it is 0.5"):
        workdir.check(changed("train", TrainConfig(z_loss=0.5)))


def test_checkpoints_of_an_unknown_run_are_not_touched(workdir):
    workdir.experiment.unlink()
    with pytest.raises(UserError, match="checkpoints of an unknown run"):
        workdir.check(CONFIG)


def test_a_place_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for path in ("file", "file/run", "file/a/b"):
        with pytest.raises(UserError, match=r"--workdir=.* cannot be written .*it is a file.*choose another"):
            Workdir(tmp_path / path).check(CONFIG)
    monkeypatch.setattr("os.access", lambda *_: False)  # the tests may run as root, whom nothing is forbidden
    with pytest.raises(UserError, match=r"--workdir=.* cannot be written .*no permission.*choose another"):
        Workdir(tmp_path / "run").check(CONFIG)
    with pytest.raises(UserError, match=r"--workdir=gs://bucket/run: .* file system"):
        Workdir("gs://bucket/run")


def test_a_claim_that_fails_leaves_the_old_file_and_nothing_beside_it(workdir, monkeypatch):
    before = workdir.experiment.read_text()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError):
        workdir.claim(changed("seed", 1))
    assert workdir.experiment.read_text() == before
    assert sorted(path.name for path in workdir.path.iterdir()) == ["checkpoints", "experiment.json"]
