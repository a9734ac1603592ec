"""Flags that read and change an experiment: what they accept, and the one line that they print otherwise."""

import os
import pathlib
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import ConfigDict

from ml.errors import UserError
from scripts import config_flag

_ROOT = pathlib.Path(__file__).resolve().parents[2]

_CONFIG = """
from ml_collections import ConfigDict

def get_config(arg=""):
    return ConfigDict({
        "train": {"steps": 100, "clip": 1.0, "resume": True, "name": arg or "plain", "seed": None},
        "data": {"sources": [{"path": "a", "weight": 1.0}, {"path": "b", "weight": 2.0}], "weights": {}},
        "optimizer": {"betas": (0.9, 0.95), "exclude": ["bias"], "empty": []},
        "model": {"moe": None, "pattern": []},
    })
"""

_SCRIPT = """
from absl import flags
from scripts import app, config_flag

_WORKDIR = flags.DEFINE_string("workdir", None, "where results go")
config_flag.define()

def main():
    print(config_flag.load().to_json(), _WORKDIR.value)

if __name__ == "__main__":
    app.run(main, usage="Shows a configuration. Example: show.py --config=file.py")
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "quick.py"
    path.write_text(_CONFIG)
    return path


def _load(*arguments: str) -> ConfigDict:
    values = flags.FlagValues()
    argv = ["train.py", *arguments]
    config_flag.define(flag_values=values, argv=argv)
    values(argv)
    return config_flag.load(flag_values=values)


def _override(config_file, *overrides: str) -> ConfigDict:
    return _load(f"--config={config_file}", *overrides)


@pytest.mark.parametrize(
    ("override", "path", "expected"),
    [
        ("train.steps=24", ("train", "steps"), 24),
        ("train.steps=1e6", ("train", "steps"), 1_000_000),
        ("train.steps=-1", ("train", "steps"), -1),
        ("train.steps=null", ("train", "steps"), None),
        ("train.clip=2", ("train", "clip"), 2.0),
        ("train.clip=3e-4", ("train", "clip"), 3e-4),
        ("train.resume=false", ("train", "resume"), False),
        ("train.resume=True", ("train", "resume"), True),
        ("train.name=24", ("train", "name"), "24"),
        ("train.name=", ("train", "name"), ""),
        ("train.name=a=b:c d", ("train", "name"), "a=b:c d"),
        ("train.seed=7", ("train", "seed"), 7),
        ("train.seed=0.5", ("train", "seed"), 0.5),
        ("train.seed=true", ("train", "seed"), True),
        ("train.seed=null", ("train", "seed"), None),
        ("train.seed=None", ("train", "seed"), None),
        ("train.seed=run one", ("train", "seed"), "run one"),
        ("train.seed=[1, 2]", ("train", "seed"), [1, 2]),
        ("data.sources[1].path=z", ("data", "sources", 1, "path"), "z"),
        ('data.sources=[{"path": "q"}]', ("data", "sources", 0, "path"), "q"),
        ("optimizer.betas=[0.8, 1]", ("optimizer", "betas"), (0.8, 1.0)),
        ("optimizer.betas=(0.8, 0.9)", ("optimizer", "betas"), (0.8, 0.9)),
        ("optimizer.betas[1]=0.5", ("optimizer", "betas"), (0.9, 0.5)),
        ("optimizer.exclude=bias,scale", ("optimizer", "exclude"), ["bias", "scale"]),
        ("optimizer.exclude=['bias','scale']", ("optimizer", "exclude"), ["bias", "scale"]),
        ("optimizer.exclude=1,2", ("optimizer", "exclude"), ["1", "2"]),
        ("optimizer.exclude=", ("optimizer", "exclude"), []),
        ("optimizer.empty=1,2", ("optimizer", "empty"), [1, 2]),
        ("model.moe.num_experts=8", ("model", "moe", "num_experts"), 8),
        ('model.moe={"num_experts": 8}', ("model", "moe", "num_experts"), 8),
        ('train={"steps": 3}', ("train", "steps"), 3),
        ("data.weights.web=0.5", ("data", "weights", "web"), 0.5),
    ],
)
def test_override_takes_the_type_of_what_it_replaces(config_file, override, path, expected):
    value = _override(config_file, f"--config.{override}")
    for key in path:
        value = value[key]
    assert value == expected
    assert type(value) is type(expected)


def test_overrides_apply_in_order_wherever_the_file_stands(config_file):
    before = ["--config.train.steps=1", "--config.train.steps=2", "--config.model.moe.top_k=1"]
    after = ["--config.model.moe.num_experts=4"]
    config = _load(*before, f"--config={config_file}", *after)
    assert config.train.steps == 2
    assert config.model.moe.to_dict() == {"top_k": 1, "num_experts": 4}
    assert _load(f"--config={config_file}", *before, *after) == config


def test_value_may_follow_as_the_next_argument(config_file):
    assert _load("--config", str(config_file), "-config.train.steps", "5").train.steps == 5


def test_argument_after_the_colon_reaches_get_config(config_file):
    assert _load(f"--config={config_file}:a:b").train.name == "a:b"
    assert _load(f"--config={config_file}").train.name == "plain"


def test_references_within_a_config_follow_the_file_and_untouched_keys_stay(config_file, tmp_path):
    path = tmp_path / "references.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        "    c = ConfigDict({'a': 1, 'b': 5})\n"
        "    c.double = c.get_ref('a') * 2\n"
        "    return c\n"
    )
    config = _load(f"--config={path}", "--config.b=6")
    assert config.to_dict() == {"a": 1, "b": 6, "double": 2}


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.steps=abc", ["--config.train.steps=abc", "expected int", "'abc'"]),
        ("train.steps=1.5", ["expected int"]),
        ("train.steps=", ["expected int"]),
        ("train.clip=big", ["expected float"]),
        ("train.resume=maybe", ["expected true or false"]),
        ("train.stesp=1", ["--config.train.stesp", "no such key", "did you mean '--config.train.steps'?"]),
        ("trian.steps=1", ["--config.trian", "did you mean '--config.train'?"]),
        ("steps=1", ["--config.steps", "did you mean '--config.train.steps'?"]),
        ("train.zzzz=1", ["--config.train.zzzz", "valid: clip, name, resume, seed, steps"]),
        ("train.steps.more=1", ["--config.train.steps.more", "config.train.steps has no keys, it is 100"]),
        ("train=1", ["config.train is a group of keys", "--config.train.KEY=VALUE"]),
        ("train.steps[0]=1", ["config.train.steps is not a list"]),
        ("data.sources.path=1", ["config.data.sources is a list", "--config.data.sources[0].path"]),
        ("data.sources[2].path=1", ["config.data.sources has 2 entries"]),
        ("data.sources[0].pth=1", ["--config.data.sources[0].pth", "did you mean '--config.data.sources[0].path'?"]),
        ("optimizer.betas=[0.9, oops", ["expected a list"]),
        ("optimizer.betas=0.9,oops", ["--config.optimizer.betas[1]=oops", "expected float"]),
        ("train..steps=1", ["not a key"]),
    ],
)
def test_bad_override_names_the_key_and_the_mend(config_file, override, parts):
    with pytest.raises(UserError) as error:
        _override(config_file, f"--config.{override}")
    for part in parts:
        assert part in str(error.value)


def test_missing_file_names_the_nearest(config_file, tmp_path):
    with pytest.raises(UserError, match=r"--config=.*quik.py: no such file; did you mean '.*quick.py'\?"):
        _load(f"--config={tmp_path}/quik.py")
    with pytest.raises(UserError, match=r"a directory; .*quick.py"):
        _load(f"--config={tmp_path}")
    with pytest.raises(UserError, match="no directory"):
        _load(f"--config={tmp_path}/nowhere/quick.py")
    with pytest.raises(UserError, match=r"--config is missing.*--config=configs/"):
        _load("--config.train.steps=3")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1\n", r"broken.py: it lacks a function get_config"),
        ("def get_config():\n    return 3\n", r"get_config returned int"),
        ("def get_config():\n    x = 1\n    return x.foo\n", r"broken.py:3: AttributeError"),
        ("def get_config():\n    import json\n    json.loads('{')\n", r"broken.py:3: JSONDecodeError"),
        ("import nowhere_at_all\n", r"broken.py:1: ModuleNotFoundError: .*nowhere_at_all"),
        ("x = 1\ndef get_config(:\n", r"broken.py:2: SyntaxError"),
        ("from ml.errors import UserError\ndef get_config():\n    raise UserError('no such size')\n", "no such size"),
    ],
)
def test_broken_file_is_one_line_with_its_place(tmp_path, source, message):
    path = tmp_path / "broken.py"
    path.write_text(source)
    with pytest.raises(UserError, match=message) as error:
        _load(f"--config={path}")
    assert "\n" not in str(error.value)
    assert "--config" in str(error.value)


def test_file_that_takes_no_argument_says_so(tmp_path):
    path = tmp_path / "plain.py"
    path.write_text("from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict()\n")
    with pytest.raises(UserError, match=r"takes no :ARG"):
        _load(f"--config={path}:small")


def _run(tmp_path, *arguments: str) -> subprocess.CompletedProcess:
    script = tmp_path / "show.py"
    script.write_text(_SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    return subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )


def test_script_prints_the_changed_config(config_file, tmp_path):
    done = _run(tmp_path, "--config.train.steps=24", f"--config={config_file}", "--workdir=w")
    assert done.returncode == 0, done.stderr
    assert '"steps": 24' in done.stdout
    assert done.stdout.endswith("w\n")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "--config is missing"),
        (["--config=nope.py"], "no such file"),
        (["--config=quick.py", "--config.train.stesp=1"], "did you mean '--config.train.steps'?"),
        (["--config=quick.py", "--config.train.steps=abc"], "expected int"),
        (["--config=quick.py", "--config.train.steps"], "--config.train.steps"),
        (["--config=quick.py", "--config.train.steps", "--workdir=w"], "--config.train.steps has no value"),
        (["--config"], "--config"),
        (["--config="], "--config has no value"),
        (["--config", "--workdir=w"], "--config has no value"),
    ],
)
def test_script_fails_in_one_line_with_status_2(config_file, tmp_path, arguments, part):
    done = _run(tmp_path, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert part in done.stderr


def test_help_fits_a_screen_and_does_not_list_overrides(config_file, tmp_path):
    done = _run(tmp_path, "--config=quick.py", "--config.train.steps=3", "--help")
    assert done.returncode == 0
    assert "--config:" in done.stdout and "--workdir:" in done.stdout
    assert "config.train.steps" not in done.stdout
    assert len(done.stdout.splitlines()) <= 24
