"""scripts/convert.py as a user runs it: there and back, and what it says when it cannot."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ml.checkpoint.pretrained import load_model
from ml.models.huggingface import load_config

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "models" / "golden"


def convert(*arguments):
    """Runs the script in a process of its own."""
    command = [sys.executable, str(ROOT / "scripts" / "convert.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"XLA_FLAGS": ""})


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The golden Qwen2 with a tokenizer, as a work directory."""
    source = tmp_path_factory.mktemp("convert") / "hf"
    shutil.copytree(GOLDEN / "qwen2", source)
    tokens = [{"content": "<|endoftext|>", "id": 0, "special": True}]
    (source / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "chat_template": "x"}))
    done = convert("--from=hf", f"--input={source}", f"--output={source.parent / 'work'}")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{source.parent / 'work'}\n"
    return source.parent / "work"


def test_there_and_back(workdir, tmp_path):
    assert {path.name for path in workdir.iterdir()} == {
        *("experiment.json", "checkpoints", "tokenizer.json", "tokenizer_config.json")
    }
    config, params, tokenizer = load_model(workdir)
    assert config == load_config(GOLDEN / "qwen2")
    assert tokenizer == workdir / "tokenizer.json"
    assert str(params["embed"]["embedding"].dtype) == "bfloat16"

    done = convert("--from=megabatch", f"--input={workdir}", f"--output={tmp_path / 'out'}", "--dtype=float32")
    assert done.returncode == 0, done.stderr
    again, back, _ = load_model(tmp_path / "out")
    assert again == config
    kernel = back["layers"]["attention"]["query"]["kernel"]
    assert str(kernel.dtype) == "float32"
    np.testing.assert_array_equal(kernel, params["layers"]["attention"]["query"]["kernel"])
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["chat_template"] == "x"
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == 0


@pytest.mark.slow
def test_mistakes(workdir, tmp_path):
    """Each ends in one line on stderr and status 2, and leaves no file behind."""
    unsupported = tmp_path / "unsupported"
    shutil.copytree(GOLDEN / "qwen2", unsupported)
    values = json.loads((unsupported / "config.json").read_text()) | {"model_type": "qwen2_moe"}
    (unsupported / "config.json").write_text(json.dumps(values))
    truncated = tmp_path / "truncated"
    shutil.copytree(GOLDEN / "qwen2", truncated)
    weights = (truncated / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(weights[:-1])
    out = tmp_path / "out"
    cases = [
        (["--from=hf", f"--input={unsupported}"], "model_type 'qwen2_moe' is not a supported architecture"),
        (["--from=hf", f"--input={truncated}"], "cut short"),
        (["--from=hf", f"--input={workdir}"], "use --from=megabatch"),
        (["--from=megabatch", f"--input={workdir}", "--step=7"], "has no checkpoint 7; there are: 0"),
        ([f"--input={workdir}"], "--from is missing"),
    ]
    before = set(tmp_path.iterdir())
    for arguments, expected in cases:
        done = convert(*arguments, f"--output={out}")
        assert done.returncode == 2, (arguments, done)
        lines = done.stderr.strip().splitlines()
        assert len([line for line in lines if not line.startswith("note: ")]) == 1, done.stderr
        assert expected in lines[-1]
        assert set(tmp_path.iterdir()) == before
    done = convert("--from=hf", f"--input={GOLDEN / 'qwen2'}", f"--output={truncated}")
    assert done.returncode == 2 and "not empty" in done.stderr
    assert {path.name for path in truncated.iterdir()} == {"config.json", "model.safetensors", "logits.npy"}


def test_help_fits_a_screen():
    done = convert("--help")
    assert done.returncode == 0
    assert "Example" in done.stdout and "--from=hf" in done.stdout
    lines = done.stdout.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 120
