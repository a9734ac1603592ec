"""Continues text with a trained model: the completion on stdout, everything else on stderr."""

import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import app
from absl import flags
from compiled import keep_compiled_programs

from ml.data.tokenizer import Tokenizer
from ml.errors import UserError
from ml.serve import Completion, EngineConfig, SamplingParams, ServedModel, TextStream, make_engine, serving_mesh
from ml.serve.batch import Job
from ml.serve.batch.job import terminable
from ml.serve.front import Front
from ml.serve.placement import MeshError
from ml.serve.scheduling.schedules import SCHEDULES
from ml.serve.text.served_model import WEIGHTS, serving_dtype

USAGE = """Continues text with a model: the work directory of a training run, or a Hugging Face folder with tokenizer.
Only the completion goes to stdout; several prompts run as a batch, and their completions follow in order.
With --input and --output, answers a file in OpenAI's Batch format; a job that was stopped goes on where it was.

Examples:
  python scripts/generate.py --model=runs/quickstart --prompt="def main(" --max_tokens=64
  python scripts/generate.py --model=Qwen3-0.6B --input=batch.jsonl --output=out.jsonl --weights=int8 --tensor=4
"""

_MODEL = flags.DEFINE_string("model", None, "Folder of the model.")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "Text to continue; may be given again. Empty: write from nothing.")
_PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "File whose whole content is a prompt; -: standard input.")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", None, "Most tokens to write (default: 128, or what still fits).")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0: always the likeliest token; 1: the model's own odds.")
_TOP_P = flags.DEFINE_float("top_p", 0.95, "Draw from the likeliest tokens that hold this probability; 1: all.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from this many likeliest tokens; 0: all.")
_SEED = flags.DEFINE_integer("seed", 0, "The same seed and prompt give the same text.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint of a work directory (default: the newest).", lower_bound=0)
_INPUT = flags.DEFINE_string("input", None, "Requests in OpenAI's Batch file format, one a line.")
_OUTPUT = flags.DEFINE_string("output", None, "File that gets a line for each request of --input.")
_ERRORS = flags.DEFINE_string("errors", None, "File for the lines of requests that fail (default: --output too).")
_SCHEDULE = flags.DEFINE_enum("schedule", "planned", sorted(SCHEDULES), "Order of --input.")
_SPECULATE = flags.DEFINE_integer(
    "speculate", 0, "Most tokens guessed and verified at once, where texts repeat themselves; 0: none.", lower_bound=0
)
_SPECULATE_NGRAM = flags.DEFINE_integer("speculate_ngram", 3, "Longest n-gram looked up for a guess.", lower_bound=1)
_TENSOR = flags.DEFINE_integer("tensor", 1, "Devices that share one copy of the model.", lower_bound=1)
_DATA = flags.DEFINE_integer("data", 1, "Copies of the model, each with a part of the prompts.", lower_bound=1)
_CHAT_TEMPLATE = flags.DEFINE_string("chat_template", None, "Jinja file to use instead of the model's own.")
_WEIGHTS = flags.DEFINE_enum("weights", None, WEIGHTS, "How weights are kept (default: as this machine computes).")

_DEFAULT_MAX_TOKENS = 128
_NOT_WITH_INPUT = ("prompt", "prompt_file", "max_tokens", "temperature", "top_p", "top_k")


def main() -> None:
    """Loads, generates, prints."""
    if _INPUT.value is not None or _OUTPUT.value is not None or _ERRORS.value is not None:
        _check_job_flags()
        _answer_file(_load())
        return
    prompts, wanted = _prompts(), _sampling()
    model = _load()
    ids = [model.encode(prompt) for prompt in prompts]
    sampling = [_fit(wanted, len(each), model.config.max_length) for each in ids]
    lengths = [len(each) + asked.max_tokens for each, asked in zip(ids, sampling, strict=True)]
    settings = EngineConfig.for_job(lengths, model.config.max_length, **_settings())
    engine = make_engine(model.config, model.params, settings, stop_ids=model.stop_ids, mesh=model.mesh)
    try:
        _print_completions(engine, model.tokenizer, prompts, ids, sampling)
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _settings() -> dict[str, Any]:
    return {
        "speculate": _SPECULATE.value,
        "speculate_ngram": _SPECULATE_NGRAM.value,
        "dtype": serving_dtype(_WEIGHTS.value),
    }


def _load() -> ServedModel:
    keep_compiled_programs()
    if not _MODEL.value:
        raise UserError("--model is missing: give a work directory or a Hugging Face folder (see generate.py --help)")
    try:
        return ServedModel.load(
            _MODEL.value,
            step=_STEP.value,
            weights=_WEIGHTS.value,
            chat_template=_CHAT_TEMPLATE.value,
            mesh=serving_mesh(data=_DATA.value, tensor=_TENSOR.value),
        )
    except MeshError as error:
        raise UserError(f"--{error}") from error
    except UserError as error:
        raise UserError(f"--model: {error}") from error


def _check_job_flags() -> None:
    for name in ("input", "output"):
        if not flags.FLAGS[name].value:
            raise UserError(f"--{name} is missing: --input and --output go together (see generate.py --help)")
    for name in _NOT_WITH_INPUT:
        if flags.FLAGS[name].present:
            raise UserError(f"--{name} does not go with --input: each request says in its body what it wants")


def _answer_file(model: ServedModel) -> None:
    """A job: see `ml.serve.batch`."""
    source, output, errors = (None if f.value is None else Path(f.value) for f in (_INPUT, _OUTPUT, _ERRORS))
    assert source is not None and output is not None  # see _check_job_flags
    job = Job(model, source, output, errors)
    settings = job.engine_config(schedule=_SCHEDULE.value, **_settings())
    grammars = model.grammars() if job.structured else None
    engine = make_engine(
        model.config, model.params, settings, stop_ids=model.stop_ids, grammars=grammars, mesh=model.mesh
    )
    with terminable():
        result = job.run(engine, seed=_SEED.value)
    if result.interrupted:
        sys.exit(130)
    if result.counts.failed and not result.counts.answered and not result.counts.before:
        sys.exit(1)


def _print_completions(
    engine: Front,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    ids: Sequence[list[int]],
    sampling: Sequence[SamplingParams],
) -> None:
    streams = [TextStream(tokenizer.decode, each) for each in ids]
    texts = [""] * len(ids)
    times: list[float] = []

    def on_tokens(index: int, tokens: list[int]) -> None:
        times.append(time.perf_counter())
        new = streams[index].push(tokens)
        if len(ids) == 1:
            print(new, end="", flush=True)
        texts[index] += new

    start = time.perf_counter()
    completions = [completion for (completion,) in engine.generate(ids, sampling, on_tokens)]
    for index, stream in enumerate(streams):
        if len(ids) > 1:
            _note(f"--- {index + 1} of {len(ids)}: {_shortened(prompts[index])}")
            print(texts[index], end="")
        print(stream.finish(), flush=True)
    _report(completions, [moment - start for moment in times])


def _report(completions: Sequence[Completion], times: Sequence[float]) -> None:
    count = sum(len(completion.tokens) for completion in completions)
    stopped = sum(completion.finish_reason == "stop" for completion in completions)
    note = f"{count} tokens, {stopped} of {len(completions)} ended by the model itself"
    if times:
        note += f"; first after {times[0]:.2f} s (with compilation), all after {times[-1]:.2f} s"
        note += f", {count / times[-1]:.1f} tokens/s"
    _note(note)


def _prompts() -> list[str]:
    prompts = list(_PROMPT.value)
    for prompt in prompts:
        if any("\ud800" <= character <= "\udfff" for character in prompt):  # how Python shows other bytes of argv
            raise UserError("--prompt is not UTF-8: convert it")
    if _PROMPT_FILE.value is not None:
        try:
            raw = sys.stdin.buffer.read() if _PROMPT_FILE.value == "-" else Path(_PROMPT_FILE.value).read_bytes()
            prompts.append(raw.decode("utf-8"))
        except OSError as error:
            raise UserError(f"--prompt_file={_PROMPT_FILE.value}: cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(
                f"--prompt_file={_PROMPT_FILE.value}: not UTF-8 at byte {error.start}: convert it"
            ) from error
    if not prompts:
        raise UserError('no prompt: give --prompt="some text" or --prompt_file (--prompt="" writes from nothing)')
    return prompts


def _sampling() -> SamplingParams:
    try:
        return SamplingParams(
            max_tokens=_DEFAULT_MAX_TOKENS if _MAX_TOKENS.value is None else _MAX_TOKENS.value,
            temperature=_TEMPERATURE.value,
            top_k=_TOP_K.value,
            top_p=_TOP_P.value,
            seed=_SEED.value,
        )
    except ValueError as error:  # begins with the field's name, which is the flag's
        raise UserError(f"--{error}") from error


def _fit(sampling: SamplingParams, length: int, longest: int) -> SamplingParams:
    """The number of tokens to write, where not asked for, cut to what the model has room for."""
    room = longest - length
    if room < 1:
        raise UserError(
            f"--prompt is {length} tokens long, but the model's longest sequence is {longest}: "
            f"shorten it to at most {longest - 1} tokens"
        )
    if sampling.max_tokens <= room:
        return sampling
    if _MAX_TOKENS.value is not None:
        raise UserError(
            f"--max_tokens={sampling.max_tokens} and a prompt of {length} tokens exceed the model's longest sequence, "
            f"{longest}: set --max_tokens={room} or less, or shorten the prompt"
        )
    _note(f"note: writing at most {room} tokens, to the model's longest sequence, {longest}")
    return dataclasses.replace(sampling, max_tokens=room)


def _shortened(prompt: str) -> str:
    line = " ".join(prompt.split())
    return line if len(line) <= 60 else f"{line[:57]}..."


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    app.run(main, usage=USAGE)
