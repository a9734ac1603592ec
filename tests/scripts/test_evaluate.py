"""`scripts/evaluate.py`: a run's own held-out text, any other text, and what it refuses."""

import json
import math

import pytest
from script_processes import error_of, run
from training_cases import write_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    evaluate = ["--config.eval.every=4", "--config.eval.batches=1000"]  # at the last step, on the whole of the text
    done = run("train.py", f"--config={write_config(folder)}", f"--workdir={folder / 'w'}", *evaluate)
    assert done.returncode == 0, done.stderr
    return folder


def measure(*arguments):
    done = run("evaluate.py", *arguments)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    return json.loads(line)


def test_the_runs_own_text_gives_what_the_run_reported(trained):
    got = measure(f"--model={trained / 'w'}")
    last = json.loads((trained / "w" / "metrics.jsonl").read_text().splitlines()[-1])
    assert got["loss"] == pytest.approx(last["eval_loss"], rel=1e-5)
    assert got["perplexity"] == pytest.approx(math.exp(got["loss"]))
    assert got["bits_per_byte"] == pytest.approx(got["loss"] * got["tokens"] / math.log(2) / got["bytes"])
    by_rows_of_one = measure(f"--model={trained / 'w'}", "--batch_size=1")
    assert by_rows_of_one["loss"] == pytest.approx(got["loss"], rel=1e-5)
    assert by_rows_of_one["tokens"] == got["tokens"]
    earlier = measure(f"--model={trained / 'w'}", "--step=2")
    assert earlier["loss"] != got["loss"] and earlier["tokens"] == got["tokens"]


def test_any_text(trained, tmp_path):
    texts = ["alpha beta gamma", "for x in range", "größer"]
    (tmp_path / "a.txt").write_text("".join(texts))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    plain = measure(f"--model={trained / 'w'}", f"--text={tmp_path / 'a.txt'}")
    lines = measure(f"--model={trained / 'w'}", f"--text={tmp_path / 'a.jsonl'}", "--text_field=body")
    assert plain["bytes"] == lines["bytes"] == len("".join(texts).encode())
    assert lines["tokens"] == plain["tokens"] + 2, "each document's end counts"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "a.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: --model is missing; name a work directory"),
        (["--model=nowhere"], "error: nowhere: no such folder; "),
        (["--model=WORKDIR", "--step=3"], "has no checkpoint 3; there are: 2, 4"),
        (["--model=WORKDIR", "--text=missing.txt"], "'missing.txt' does not exist"),
        (["--model=WORKDIR", "--text=EMPTY"], "no text in the 1 file"),
        (["--model=WORKDIR", "--text=CORPUS", "--text_field=txt"], "did you mean 'text'?"),
        (
            ["--model=WORKDIR", "--text=CORPUS", "--sequence_length=64"],
            "64 is longer than the model's 32",
        ),
        (["--model=WORKDIR", "--batch_size=0"], "error: flag --batch_size=0"),
    ],
)
def test_mistakes(trained, tmp_path, arguments, message):
    (tmp_path / "empty.txt").write_text("")
    names = {"WORKDIR": trained / "w", "CORPUS": trained / "corpus.jsonl", "EMPTY": tmp_path / "empty.txt"}
    for name, path in names.items():
        arguments = [argument.replace(name, str(path)) for argument in arguments]
    assert message in error_of(run("evaluate.py", *arguments))


@pytest.mark.slow
def test_a_run_that_holds_nothing_out(trained, tmp_path):
    arguments = [f"--config={trained / 'tiny.py'}", f"--workdir={tmp_path}", "--config.data.heldout_fraction=0"]
    assert run("train.py", *arguments, "--config.train.steps=1").returncode == 0
    assert "name a text with --text" in error_of(run("evaluate.py", f"--model={tmp_path}"))


def test_a_folder_without_a_tokenizer(trained, tmp_path):
    (tmp_path / "checkpoints").symlink_to(trained / "w" / "checkpoints")
    (tmp_path / "experiment.json").write_text((trained / "w" / "experiment.json").read_text())
    assert "has no tokenizer.json" in error_of(run("evaluate.py", f"--model={tmp_path}"))
