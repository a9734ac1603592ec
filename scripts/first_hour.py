"""Plays a newcomer's first hour as the README tells it, and ends at the first step that fails."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import app
from absl import flags

_USAGE = """
Plays the first hour, each step with its command and its time: train on your own text, stop, resume, measure, compare,
let it write, export to Hugging Face's format, serve, ask with the openai client and in the terminal, answer a batch
offline, preflight and plan a pod job, ask for a batch size, put a paper's claim to the test. Serves the quickstart's
model where there is one.

  make first-hour
"""
_ROOT = Path(__file__).resolve().parents[1]
# Enough of them that a signal after the first one comes before the last.
_STEPS = 100
# A model that trains in seconds: what is shown is the way, not the text that it writes.
_SMALL = (
    "--config=configs/lm/quickstart.py",
    '--config.data.sources=[{"kind": "text", "path": "docs/**/*.md", "split_by": "paragraph"}]',
    "--config.data.tokenizer.vocab_size=512",
    "--config.data.heldout_fraction=0.05",
    "--config.model.vocab_size=512",
    "--config.model.num_layers=2",
    "--config.model.embed_dim=64",
    "--config.model.mlp_dim=128",
    f"--config.train.steps={_STEPS}",
    "--config.train.batch_size=4",
    "--config.train.microbatches=1",
    "--config.eval.every=0",
    "--config.checkpoint.every=1000",
)
_QUESTION = "def main("

if __name__ == "__main__":
    flags.DEFINE_string("workdir", "runs/first_hour", "folder for all that it makes; emptied at the start")
    flags.DEFINE_string("model", "runs/quickstart", "run whose model is served; missing: the one trained here")
    flags.DEFINE_string("study", "zero_memory", "the paper's claim to put to the test (scripts/reproduce.py --list)")
    flags.DEFINE_string("topology", "v5e:4x4", "the machine to preflight for")


class StepFailed(Exception):
    """A step of the hour did not do what it should."""


class Hour:
    """Runs steps one after another.

    Attributes:
      folder: where everything goes.
    """

    def __init__(self, folder: Path):
        self.folder, self._count, self._began = folder, 0, time.monotonic()
        # What is compiled once need not be compiled again by the next command.
        self._environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "PYTHONUNBUFFERED": "1",
        }

    def step(self, title: str, action: Callable[[], str]) -> None:
        """Runs ``action``, which returns what was seen, and prints both with the time it took."""
        self._count += 1
        print(f"\n[{self._count}] {title}", flush=True)
        start = time.monotonic()
        seen = action()
        print(f"    {seen}\n    {time.monotonic() - start:.1f} s", flush=True)

    def run(self, *command: str, text: str | None = None, status: int = 0) -> str:
        """Runs a script, and returns what it wrote to both streams.

        Raises:
          StepFailed: it ended with another status.
        """
        show(command, text)
        done = subprocess.run(
            [sys.executable, *command],
            cwd=_ROOT,
            env=self._environment,
            input=text,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode != status:
            raise StepFailed(f"it ended with status {done.returncode}:\n{done.stdout}")
        return done.stdout

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Starts a script whose output is read while it runs."""
        show(command)
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=_ROOT,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._began


def show(command: Sequence[str], text: str | None = None) -> None:
    """Prints a command as one would type it."""
    fed = "" if text is None else f"echo {shlex.quote(text.strip())} | "
    print(f"    $ {fed}python {shlex.join(command)}", flush=True)


def check(holds: bool, what: str) -> None:
    """Raises `StepFailed` unless ``holds``."""
    if not holds:
        raise StepFailed(what)


def train(hour: Hour, run: Path) -> str:
    """Trains until a few steps are done, then sends SIGTERM, as a preempted machine does."""
    process = hour.start("scripts/train.py", *_SMALL, f"--workdir={run}")
    assert process.stdout is not None
    log = []
    for line in process.stdout:
        log.append(line)
        if re.match(r"step [1-9]", line):
            process.send_signal(signal.SIGTERM)
            break
    log += process.stdout.readlines()
    check(process.wait() == 0, f"training ended with status {process.returncode}:\n{''.join(log)}")
    saved = re.search(r"saved at step (\d+)", "".join(log))
    check(saved is not None, f"it did not say that it saved:\n{''.join(log)}")
    assert saved is not None
    return f"stopped by SIGTERM, {saved[0]}"


def resume(hour: Hour, run: Path) -> str:
    """The same command goes on to the end, and leaves a report."""
    log = hour.run("scripts/train.py", *_SMALL, f"--workdir={run}")
    going_on = re.search(r"going on from the checkpoint of step \d+", log)
    check(going_on is not None, f"it did not resume:\n{log}")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    check([row["step"] for row in rows] == list(range(1, _STEPS + 1)), f"steps are missing or doubled in {run}")
    check(rows[-1]["loss"] < rows[0]["loss"], f"the loss rose from {rows[0]['loss']} to {rows[-1]['loss']}")
    check((run / "report.html").is_file(), "there is no report.html")
    assert going_on is not None
    return f"{going_on[0]}; loss {rows[0]['loss']:.2f} -> {rows[-1]['loss']:.2f}; {run / 'report.html'}"


def measure(hour: Hour, run: Path) -> str:
    """The held-out loss of the checkpoint."""
    measured = json.loads(hour.run("scripts/evaluate.py", f"--model={run}").splitlines()[-1])  # notes come first
    check(0 < measured["bits_per_byte"] < 8, f"bytes cannot cost that many bits: {measured}")
    return f"{measured['bits_per_byte']:.2f} bits per byte of held-out text"


def serve(hour: Hour, exported: Path) -> tuple[subprocess.Popen[str], str]:
    """Starts the server and waits until it listens; returns its process and address."""
    # Without --nowarm_up it would compile for many users at once before the first request comes.
    process = hour.start(
        *("scripts/serve.py", f"--model={exported}", "--port=0", "--max_length=128", "--nowarm_up"),
    )
    assert process.stdout is not None
    log = []
    for line in process.stdout:
        log.append(line)
        if match := re.search(r"serving .* on (http://\S+)", line):
            return process, match[1]
    raise StepFailed(f"the server ended with status {process.wait()}:\n{''.join(log)}")


def query(address: str) -> str:
    """Asks with the openai client, whole and as a stream."""
    import openai

    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        name = next(iter(client.models.list())).id
        asked = {"model": name, "prompt": _QUESTION, "max_tokens": 16, "temperature": 0.0}
        print(f"    >>> client.completions.create(**{asked})", flush=True)
        whole = client.completions.create(**asked).choices[0].text  # type: ignore[call-overload]
        stream = client.completions.create(**asked, stream=True)  # type: ignore[call-overload]
        streamed = "".join(choice.text for chunk in stream for choice in chunk.choices)
    check(bool(whole) and whole == streamed, f"the whole answer {whole!r} is not the streamed one {streamed!r}")
    return f"{_QUESTION + whole!r}"


def answer_batch(hour: Hour, exported: Path) -> str:
    """Answers a file of requests with one prefix in OpenAI's Batch format."""
    source, output = hour.folder / "batch.jsonl", hour.folder / "answers.jsonl"
    prompts = [
        f'class Stack:\n    """Last in, first out."""\n\n    def {name}(self' for name in ("push", "pop", "peek")
    ]
    lines = [
        {"custom_id": f"{i}", "method": "POST", "url": "/v1/completions", "body": {"prompt": p, "max_tokens": 16}}
        for i, p in enumerate(prompts)
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    hour.run("scripts/generate.py", f"--model={exported}", f"--input={source}", f"--output={output}")
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    check(sorted(answer["custom_id"] for answer in answers) == ["0", "1", "2"], f"answers are missing: {answers}")
    check(all(answer["response"]["status_code"] == 200 for answer in answers), f"some failed: {answers}")
    return f"{len(answers)} answers in {output}"


def preflight(hour: Hour, topology: str) -> str:
    """Compiles GPT-2's training for a slice of a pod that is not here."""
    path = hour.folder / "preflight.json"
    # The quickstart's own model, at a batch with rows for all: it compiles in a minute.
    job = ("--config=configs/lm/quickstart.py", "--config.train.batch_size=64", f"--topology={topology}")
    hour.run("scripts/preflight.py", *job, f"--json={path}")
    report = json.loads(path.read_text())
    check(report["fits"], f"the job does not fit: {path.read_text()}")
    needed, available = (report["memory"][name] / 2**30 for name in ("needed", "available"))
    return f"fits: {needed:.1f} of {available:.1f} GiB on each of {report['devices']} x {report['device_kind']}"


def as_told(hour: Hour, script: str) -> str:
    """The README's own command of a script, to the letter; returns the last line that it prints."""
    told = next(
        line for line in (_ROOT / "README.md").read_text().splitlines() if line.startswith(f"python scripts/{script}")
    )
    return hour.run(*shlex.split(told, comments=True)[1:]).strip().splitlines()[-1]


def reproduce(hour: Hour, study: str) -> str:
    """Puts one paper's claim to the test."""
    output, table = hour.folder / "studies", hour.folder / "papers.md"
    log = hour.run("scripts/reproduce.py", f"--study={study}", f"--output={output}", f"--papers={table}")
    check(any(output.glob(f"{study}*.json")) and table.is_file(), f"no result was written:\n{log}")
    verdicts = [line for line in log.splitlines() if line.startswith(f"{study}: ")]
    return "\n    ".join(verdicts[1:4])


def play(folder: Path, model: Path, study: str, topology: str) -> None:
    """Plays all steps.

    Raises:
      StepFailed: at the first that does not do what it should.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    hour, run, exported = Hour(folder), folder / "run", folder / "exported"
    hour.step("Train on your own text, and stop in the middle", lambda: train(hour, run))
    hour.step("Resume", lambda: resume(hour, run))
    known = any((model / "checkpoints").glob("[0-9]*"))
    served = model if known else run
    runs = [str(run), *([str(model)] if known and (model / "metrics.jsonl").is_file() else [])]
    page = folder / "comparison.html"

    def compare() -> str:
        hour.run("scripts/compare.py", *runs, f"--output={page}")
        return str(page if len(runs) > 1 else run / "report.html")

    def export() -> str:
        hour.run("scripts/convert.py", "--from=megabatch", f"--input={served}", f"--output={exported}")
        check((exported / "model.safetensors").is_file(), "there is no model.safetensors")
        return ", ".join(sorted(path.name for path in exported.iterdir()))

    hour.step("Measure it on what it has not seen", lambda: measure(hour, run))
    hour.step("Look at the run" if len(runs) == 1 else "Compare it with the quickstart", compare)
    hour.step("Export to Hugging Face's format", export)
    told = (f"--model={exported}", f"--prompt={_QUESTION}", "--max_tokens=16")
    hour.step("Let it write", lambda: repr(hour.run("scripts/generate.py", *told)))
    server: list[tuple[subprocess.Popen[str], str]] = []

    def listen() -> str:
        server.append(serve(hour, exported))
        return server[0][1]

    def chat() -> str:
        url = f"--url={server[0][1]}/v1"
        return repr(hour.run("scripts/chat.py", url, "--completions", "--max_tokens=16", text=f"{_QUESTION}\n"))

    def stop() -> str:
        process = server[0][0]
        process.send_signal(signal.SIGTERM)
        check(process.wait(60) == 0, f"the server ended with status {process.returncode}")
        return "ended by SIGTERM, with status 0"

    try:
        hour.step("Serve it", listen)
        hour.step("Ask with the openai client", lambda: query(server[0][1]))
        hour.step("Ask in the terminal", chat)
        hour.step("Stop the server", stop)
    finally:
        for process, _ in server:
            if process.poll() is None:
                process.kill()
                process.wait()
    hour.step("Answer a batch offline", lambda: answer_batch(hour, exported))
    hour.step("Preflight a pod job", lambda: preflight(hour, topology))
    hour.step("Ask for the best layout", lambda: as_told(hour, "plan.py"))
    hour.step("Ask how large a batch", lambda: as_told(hour, "advise.py"))
    hour.step("Put a paper's claim to the test", lambda: reproduce(hour, study))
    print(f"\nthe first hour, in {hour.seconds:.0f} s; everything lies in {folder}")


def main() -> None:
    """Reads the flags and plays."""
    args = flags.FLAGS
    try:
        play(Path(args.workdir).absolute(), Path(args.model).absolute(), args.study, args.topology)
    except StepFailed as failure:
        print(f"failed: {failure}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    app.run(main, usage=_USAGE)
