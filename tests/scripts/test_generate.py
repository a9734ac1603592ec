"""scripts/generate.py as a user starts it: exit status, standard output and standard error of whole runs."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import pytest
import tokenizers

from ml.checkpoint.pretrained import save_workdir
from ml.data.tokenizer import Tokenizer
from ml.models import Transformer, TransformerConfig, init_params
from ml.models.huggingface import save_pretrained
from ml.serve import Engine, EngineConfig, SamplingParams

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "scripts" / "generate.py"
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
GREEDY = ["--temperature=0", "--max_tokens=24"]

# Runs the script once per case, in a child that shares the (slow) imports but starts JAX and the flags afresh.
DRIVER = """
import json, os, runpy, sys
import ml.checkpoint.pretrained, ml.data.tokenizer, ml.serve.engine, absl.app
script, cases, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
sys.path.insert(0, os.path.dirname(script))
for name, arguments in cases.items():
    child = os.fork()
    if child == 0:
        for number, kind in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{out}/{name}.{kind}", os.O_WRONLY | os.O_CREAT), number)
        os.dup2(os.open(os.devnull if name != "stdin" else f"{out}/prompt.txt", os.O_RDONLY), 0)
        sys.argv = [script, *arguments]
        status = 1
        try:
            runpy.run_path(script, run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code or 0
        except BaseException as error:
            print(f"escaped: {error!r}", file=sys.stderr)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    with open(f"{out}/{name}.status", "w") as file:
        file.write(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
"""


@dataclasses.dataclass
class Run:
    status: int
    out: str
    err: str


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A training run's work directory, the same model as a Hugging Face folder, and folders that lack something."""
    root = tmp_path_factory.mktemp("models")
    params = init_params(Transformer(CONFIG), jax.random.key(0))
    Tokenizer.train(["Fünf große Äpfel für 3 €: naïve 漢字 🎉. " * 20], 300).save(root / "tokenizer")
    tokenizer = root / "tokenizer" / "tokenizer.json"
    save_workdir(root / "run", CONFIG, params, tokenizer)
    experiment = json.loads((root / "run/experiment.json").read_text())
    (root / "run/experiment.json").write_text(json.dumps({**experiment, "data": {}}))
    save_pretrained(root / "hf", CONFIG, params, tokenizer)
    save_workdir(root / "no_tokenizer", CONFIG, params)
    small = dataclasses.replace(CONFIG, vocab_size=280)
    save_workdir(root / "small_vocabulary", small, init_params(Transformer(small), jax.random.key(0)), tokenizer)
    (root / "empty").mkdir()
    (root / "prompt.txt").write_text("3 € für\n", encoding="utf-8")
    (root / "latin1.txt").write_bytes("große".encode("latin-1"))
    # A tokenizer that puts <s> before every text, as Llama's does.
    opening = tokenizers.Tokenizer.from_file(str(tokenizer))
    opening.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", opening.token_to_id("<|endoftext|>"))]
    )
    save_pretrained(root / "hf_opening", CONFIG, params, tokenizer)
    opening.save(str(root / "hf_opening/tokenizer.json"))
    return root


@pytest.fixture(scope="module")
def expected(folders):
    """What the model says after ``prompt``, with or without the opening token, as ids and as text."""
    params = init_params(Transformer(CONFIG), jax.random.key(0))
    tokenizer = Tokenizer.load(folders / "tokenizer")
    engine = Engine(CONFIG, params, EngineConfig(max_running=1), stop_ids=[tokenizer.eos_id])

    def text(prompt, *, opening, sampling=SamplingParams(max_tokens=24, temperature=0.0)):
        ids = [tokenizer.bos_id] * opening + tokenizer.encode(prompt)
        return tokenizer.decode(engine.generate([ids], sampling)[0][0].tokens) + "\n"

    return text


@pytest.mark.slow
def test_a_mesh_writes_what_one_device_writes(folders, expected):
    prompts = ["3 € für", "Äpfel", "3 € naïve"]
    command = [sys.executable, SCRIPT, f"--model={folders}/run", *GREEDY, "--tensor=2", "--data=2"]
    run = subprocess.run([*command, *(f"--prompt={each}" for each in prompts)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "".join(expected(each, opening=True) for each in prompts)


@pytest.fixture(scope="module")
def runs(folders):
    run, hf = f"--model={folders}/run", f"--model={folders}/hf"
    cases = {
        "greedy": [run, "--prompt=3 € für", *GREEDY],
        "drawn": [run, "--prompt=3 € für", "--max_tokens=40", "--temperature=1.5", "--top_k=50", "--seed=7"],
        "several": [run, "--prompt=3 € für", "--prompt=Äpfel", "--prompt=", *GREEDY],
        "file": [run, f"--prompt_file={folders}/prompt.txt", *GREEDY],
        "stdin": [run, "--prompt_file=-", *GREEDY],
        "hf": [hf, "--prompt=3 € für", *GREEDY],
        "hf_empty": [hf, "--prompt=", *GREEDY],
        "hf_opening": [f"--model={folders}/hf_opening", "--prompt=3 € für", *GREEDY],
        "to_the_end": [run, "--prompt=Äpfel", "--temperature=0"],
        "help": ["--help"],
        # What follows is refused.
        "no_model": ["--prompt=x"],
        "no_prompt": [run],
        "nowhere": [f"--model={folders}/nowhere", "--prompt=x"],
        "empty": [f"--model={folders}/empty", "--prompt=x"],
        "no_tokenizer": [f"--model={folders}/no_tokenizer", "--prompt=x"],
        "small_vocabulary": [f"--model={folders}/small_vocabulary", "--prompt=x"],
        "temperature": [run, "--prompt=x", "--temperature=-1"],
        "top_p": [run, "--prompt=x", "--top_p=1.5"],
        "not_a_number": [run, "--prompt=x", "--top_p=high"],
        "max_tokens": [run, "--prompt=x", "--max_tokens=0"],
        "too_many": [run, "--prompt=x", "--max_tokens=64"],
        "too_long": [run, "--prompt=" + "3 € für" * 40],
        "no_step": [run, "--prompt=x", "--step=7"],
        "hf_step": [hf, "--prompt=x", "--step=7"],
        "no_file": [run, f"--prompt_file={folders}/missing.txt"],
        "latin1": [run, f"--prompt_file={folders}/latin1.txt"],
        "unknown_flag": [run, "--promt=x"],
        "tensor": [run, "--prompt=x", "--tensor=8"],
        "data": [run, "--prompt=x", "--tensor=2", "--data=5"],
    }
    subprocess.run([sys.executable, "-c", DRIVER, str(SCRIPT), json.dumps(cases), str(folders)], check=True)

    def read(name, kind):
        return (folders / f"{name}.{kind}").read_text(encoding="utf-8")

    return {name: Run(int(read(name, "status")), read(name, "out"), read(name, "err")) for name in cases}


def test_completion_alone_on_stdout(runs, expected):
    assert runs["greedy"].status == 0, runs["greedy"].err
    assert runs["greedy"].out == expected("3 € für", opening=True)
    assert "tokens/s" in runs["greedy"].err
    assert "Traceback" not in runs["greedy"].err


def test_drawn_text_has_whole_characters_and_depends_on_the_seed(runs, expected):
    sampling = SamplingParams(max_tokens=40, temperature=1.5, top_k=50, top_p=0.95, seed=7)
    assert runs["drawn"].out == expected("3 € für", opening=True, sampling=sampling)
    assert runs["drawn"].out != expected("3 € für", opening=True, sampling=dataclasses.replace(sampling, seed=8))


def test_several_prompts_in_order(runs, expected):
    assert runs["several"].out == "".join(expected(p, opening=True) for p in ("3 € für", "Äpfel", ""))


@pytest.mark.parametrize("name", ["file", "stdin"])
def test_prompt_from_a_file(runs, expected, name):
    assert runs[name].out == expected("3 € für\n", opening=True)


def test_hugging_face_folder_opens_texts_as_its_tokenizer_says(runs, expected):
    assert runs["hf"].out == expected("3 € für", opening=False) != expected("3 € für", opening=True)
    assert runs["hf_opening"].out == expected("3 € für", opening=True)
    assert runs["hf_empty"].out == expected("", opening=True)


def test_default_length_is_cut_to_the_model_and_said(runs, expected):
    assert runs["to_the_end"].status == 0
    assert "longest sequence, 64" in runs["to_the_end"].err


def test_help_fits_one_screen_and_shows_an_example(runs):
    lines = runs["help"].out.splitlines()
    assert runs["help"].status == 0
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 120
    assert any("--prompt=" in line and "generate.py" in line for line in lines)


@pytest.mark.parametrize(
    ("name", "place", "mend"),
    [
        ("no_model", "--model", "give a work directory"),
        ("no_prompt", "--prompt", "give --prompt"),
        ("nowhere", "--model: ", "no such folder"),
        ("empty", "--model: ", "give a work directory"),
        ("no_tokenizer", "--model: ", "copy the one"),
        ("small_vocabulary", "--model: ", "own tokenizer"),
        ("temperature", "--temperature=-1.0", "must be 0"),
        ("top_p", "--top_p=1.5", "at most 1"),
        ("not_a_number", "--top_p=high", "--help"),
        ("max_tokens", "--max_tokens=0", "at least 1"),
        ("too_many", "--max_tokens=64", "set --max_tokens="),
        ("too_long", "--prompt", "shorten it to at most 63 tokens"),
        ("no_step", "--model: ", "7"),
        ("hf_step", "--model: ", "leave the step out"),
        ("no_file", "--prompt_file=", "cannot be read"),
        ("latin1", "--prompt_file=", "not UTF-8 at byte 3"),
        ("unknown_flag", "promt", "--help"),
        ("tensor", "--tensor=8: 4 attention heads", "choose one of 1, 2, 4, and"),
        ("data", "--data=5: there are 8 devices", "room for 1 to 4 of 2 devices each"),
    ],
)
def test_mistakes_end_in_one_line(runs, name, place, mend):
    run = runs[name]
    assert (run.status, run.out) == (2, "")
    assert len(run.err.splitlines()) == 1, run.err
    assert run.err.startswith("error: ")
    assert place in run.err
    assert mend in run.err
