"""scripts/generate.py --input --output as a user starts, interrupts, kills and repeats it."""

import json
import random
import signal

import jax
import pytest
import script_processes

from ml.checkpoint.pretrained import save_workdir
from ml.data.tokenizer import Tokenizer
from ml.models import Transformer, TransformerConfig, init_params

CONFIG = TransformerConfig(
    vocab_size=300,
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=48,
    max_length=64,
    init_stddev=0.3,
)
REQUESTS = 150
# Takes the engine's place in the script's process: what is tested is the job, and compiling takes minutes.
SCRIPTED = """
import sys
sys.path.insert(0, "tests/serve/batch")
import ml.serve.engine, scripted_engine
ml.serve.engine.Engine = scripted_engine.SlowEngine
"""


@pytest.fixture(scope="module", params=["scripted", pytest.param("real", marks=pytest.mark.slow)])
def before(request):
    return SCRIPTED if request.param == "scripted" else ""


@pytest.fixture(scope="module")
def root(tmp_path_factory, before):
    """A model, a job whose requests share a prefix, and the job's whole output."""
    root = tmp_path_factory.mktemp("batch")
    Tokenizer.train(["Fünf große Äpfel für 3 €: naïve 漢字 🎉. " * 20], 300).save(root / "tokenizer")
    params = init_params(Transformer(CONFIG), jax.random.key(0))
    save_workdir(root / "run", CONFIG, params, root / "tokenizer" / "tokenizer.json")
    rng = random.Random(0)
    lines = []
    for i in range(REQUESTS):
        body = {"prompt": f"qwxz 0246 8975 hjkq yvb: {i}", "temperature": 0, "max_tokens": rng.randrange(1, 30)}
        body |= rng.choice([{}, {}, {"stop": ["e"]}, {"temperature": 1.0}, {"n": 2, "temperature": 0.7}])
        lines.append(json.dumps({"custom_id": f"é {i}", "method": "POST", "url": "/v1/completions", "body": body}))
    lines[40] = "{broken"
    (root / "in.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    run = _start(root, before, "whole.jsonl").wait()
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
    return root


def _start(root, before, output, *flags):
    arguments = [f"--model={root}/run", f"--input={root}/in.jsonl", f"--output={root}/{output}", *flags]
    return script_processes.start("generate.py", *arguments, before=before)


def _texts(path):
    """What each line says, without what depends on the day or on what was cached."""
    texts = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        choices = record["response"]["body"].get("choices")
        texts.append(json.dumps([record["id"], record["custom_id"], choices, record["error"]]))
    return sorted(texts)


def _lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_every_line_is_answered_and_the_summary_says_what_sharing_saved(root):
    assert len(_texts(root / "whole.jsonl")) == REQUESTS
    records = [json.loads(line) for line in (root / "whole.jsonl").read_text().splitlines()]
    cached = [
        r["response"]["body"]["usage"]["prompt_tokens_details"]["cached_tokens"] for r in records if not r["error"]
    ]
    assert sum(c > 0 for c in cached) > REQUESTS / 2
    assert [r["custom_id"] for r in records if r["error"]] == [None]


def test_a_killed_job_goes_on_and_ends_as_if_nothing_had_been(root, before):
    output, kills = root / "killed.jsonl", 0
    for wanted in (1, 40, 100):
        run = _start(root, before, "killed.jsonl")
        run.wait_until(lambda wanted=wanted: _lines(output) >= wanted)
        run.kill(signal.SIGKILL)
        kills += run.returncode == -signal.SIGKILL
        assert wanted <= _lines(output) < REQUESTS
    with output.open("ab") as file:  # as if the last kill had come in the middle of a write
        file.write((root / "whole.jsonl").read_bytes()[:30])
    assert kills == 3
    run = _start(root, before, "killed.jsonl").wait()
    assert run.returncode == 0, run.stderr
    assert "were done before" in run.stderr
    assert _texts(output) == _texts(root / "whole.jsonl")


@pytest.mark.sweep("scripted-15")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_job_says_how_to_go_on(root, before, number):
    output = root / f"interrupted_{number}.jsonl"
    run = _start(root, before, output.name)
    run.wait_until(lambda: _lines(output) >= 10)
    run.kill(number)
    assert run.returncode == 130, run.stderr
    assert "interrupted: " in run.stderr
    assert "the same command goes on" in run.stderr
    assert "Traceback" not in run.stderr
    kept = output.read_text()
    assert _start(root, before, output.name, "--schedule=fifo").wait().returncode == 0
    assert output.read_text().startswith(kept)
    assert _texts(output) == _texts(root / "whole.jsonl")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input=x.jsonl"], "--output is missing"),
        (["--output=x.jsonl"], "--input is missing"),
        (["--errors=x.jsonl"], "--input is missing"),
        (["--input=x", "--output=y", "--temperature=0"], "--temperature does not go with --input"),
        (["--input=nothing.jsonl", "--output=y"], "nothing.jsonl: cannot be read"),
        (["--schedule=best", "--prompt=x"], "--schedule"),
        (["--chat_template=nothing.jinja", "--prompt=x"], "nothing.jinja: cannot be read"),
    ],
)
def test_mistakes_end_in_one_line(root, before, flags, message):
    run = script_processes.start("generate.py", f"--model={root}/run", *flags, before=before).wait()
    assert run.returncode == 2
    assert len(run.stderr.splitlines()) == 1
    assert message in run.stderr


def test_a_job_without_a_single_answer_fails(root, before):
    (root / "wrong.jsonl").write_text('{"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "x", "n": 0}}\n')
    arguments = [f"--model={root}/run", f"--input={root}/wrong.jsonl", f"--output={root}/wrong_out.jsonl"]
    run = script_processes.start("generate.py", *arguments, before=before).wait()
    assert run.returncode == 1
    assert "wrong.jsonl:1: n=0: must be at least 1" in run.stderr
