"""Continues text with a trained model: the completion on stdout, everything else on stderr."""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import tokenizers
from absl import flags
from app import run

from ml.checkpoint.pretrained import load_model
from ml.data.tokenizer import Tokenizer, check_vocab
from ml.errors import UserError
from ml.serve import Completion, Engine, EngineConfig, SamplingParams, TextStream

USAGE = """Continues text with a model: the work directory of a training run, or a Hugging Face folder with tokenizer.
Only the completion goes to stdout; several prompts run as a batch, and their completions follow in order.

Examples:
  python scripts/generate.py --model=runs/quickstart --prompt="def main(" --max_tokens=64
  python scripts/generate.py --model=Qwen3-0.6B --prompt="Once upon a" --prompt="A recipe for" --temperature=0
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

_DEFAULT_MAX_TOKENS = 128


def main() -> None:
    """Loads, generates, prints."""
    prompts, wanted = _prompts(), _sampling()
    if not _MODEL.value:
        raise UserError("--model is missing: give a work directory or a Hugging Face folder (see generate.py --help)")
    folder = Path(_MODEL.value).expanduser()
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    try:
        config, params, tokenizer_path = load_model(folder, step=_STEP.value, dtype=dtype)
        if tokenizer_path is None:
            raise UserError(f"{folder} has no tokenizer.json: copy the one the model was trained with there")
        tokenizer = Tokenizer.load(tokenizer_path, where="tokenizer")
        check_vocab(tokenizer, config.vocab_size)
    except UserError as error:
        raise UserError(f"--model: {error}") from error

    opening = _opening(folder, tokenizer, tokenizer_path)
    ids = [opening + tokenizer.encode(prompt, parse_special=True) or [tokenizer.bos_id] for prompt in prompts]
    sampling = [_fit(wanted, len(each), config.max_length) for each in ids]
    lengths = [len(each) + asked.max_tokens for each, asked in zip(ids, sampling, strict=True)]
    settings = EngineConfig.for_job(lengths, config.max_length, dtype=dtype)
    engine = Engine(config, params, settings, stop_ids=_stop_ids(folder, tokenizer))
    try:
        _print_completions(engine, tokenizer, prompts, ids, sampling)
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_completions(
    engine: Engine,
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


def _opening(folder: Path, tokenizer: Tokenizer, tokenizer_path: Path) -> list[int]:
    """The tokens that every text began with in training."""
    experiment = folder / "experiment.json"
    if experiment.is_file() and "data" in json.loads(experiment.read_text(encoding="utf-8")):
        return [tokenizer.bos_id]  # as ml.data packs documents
    # A model from elsewhere: its tokenizer says what it puts before a text.
    model = tokenizers.Tokenizer.from_file(str(tokenizer_path))
    bare, whole = (model.encode("a", add_special_tokens=special).ids for special in (False, True))
    starts = [i for i in range(len(whole)) if whole[i : i + len(bare)] == bare]
    return whole[: starts[0]] if starts else []


def _stop_ids(folder: Path, tokenizer: Tokenizer) -> set[int]:
    """End of text, and what a Hugging Face folder adds to it (the end of a turn, for chat models)."""
    path = folder / "generation_config.json"
    more = None
    if path.is_file():
        try:
            more = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise UserError(f"--model: {path} is not a JSON object ({error}): mend or remove it") from error
    more = more if isinstance(more, list) else [more]
    return {tokenizer.eos_id, *(each for each in more if isinstance(each, int))}


def _shortened(prompt: str) -> str:
    line = " ".join(prompt.split())
    return line if len(line) <= 60 else f"{line[:57]}..."


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(main, usage=USAGE)
